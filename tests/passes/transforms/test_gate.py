"""The gate: measured times decide which sites, and which steps, are sparse."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import ssprop_passes.transforms.gate
import torch
from ssprop_passes.errors import NoEffectWarning
from ssprop_passes.fingerprint import identity_maybe
from ssprop_passes.selection.gather_scatter import gather_channels
from ssprop_passes.selection.selectors import topk
from ssprop_passes.sites.site import Site, Times
from ssprop_passes.transforms.gate import Gate
from torch import Tensor, nn

from ssprop_fx import (
    SparsityConfig,
    SparsityScheduler,
    bar,
    constant,
    cosine,
    join,
    linear,
    report,
    ssprop_compile,
    warmup,
)
from ssprop_fx.compiler.site_cache import GraphRecord, load_record_maybe, save_record
from ssprop_fx.runtime.module import SsPropModule

pytestmark = pytest.mark.gate


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No times known, and no compiled graphs: those of Inductor's kernels alone."""
    monkeypatch.setattr(ssprop_passes.cache_files, "cache_dir", lambda: str(tmp_path))
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers with 64 channels are slower when sparse; others save 0.5 ms at drop rate 3/4."""
    calls: list[int] = []

    def measure(match: object, k: int, selection: object) -> Times:
        calls.append(match.channels)
        return Times(dense=1.0, sparse=1.5 if match.channels == 64 else 0.5, kept=k)

    monkeypatch.setattr(ssprop_passes.transforms.gate, "measure", measure)
    return calls


def compile_two_layers(schedule: object, **config: object) -> tuple[SsPropModule, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Tanh(), nn.Conv2d(64, 32, 1))
    scheduler = SparsityScheduler(schedule)
    made = SparsityConfig(channel_multiple=1, min_channels=1, **config)
    return ssprop_compile(model, scheduler, config=made), torch.randn(2, 3, 8, 8)


@pytest.mark.slow
def test_processes_that_measure_at_the_same_time_decide_alike(
    fresh_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Any of them may find another one's entries in the compile cache."""
    kept: dict[int, Times] = {}

    def measure(match: object, k: int, selection: object) -> Times:
        if match.channels in kept:
            return kept[match.channels]
        kept[match.channels] = Times(dense=1.0, sparse=0.5, kept=k)
        # Another process, which finishes first.
        Gate({0: k}).times(match, 0, selection)
        return Times(dense=1.0, sparse=1.5, kept=k)

    monkeypatch.setattr(ssprop_passes.transforms.gate, "measure", measure)
    model, x = compile_two_layers(constant(0.5))
    model(x).sum().backward()
    assert len(report(model).sparse_sites) == len(kept) == 2
    assert len(list((tmp_path / "ssprop-gate").iterdir())) == 2


@pytest.mark.slow
def test_times_that_cannot_be_read_are_measured_again(
    fresh_cache: None, measured: list[int], tmp_path: Path
) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        model, x = compile_two_layers(constant(0.75))
        model(x).sum().backward()
        for path in (tmp_path / "ssprop-gate").iterdir():
            path.write_text("{")
    assert sorted(measured) == [32, 32, 64, 64]
    assert len(report(model).sparse_sites) == 1


def kept_rows(model: SsPropModule) -> list[int]:
    return [int(model._orig_mod[i].weight.grad.flatten(1).any(1).sum()) for i in (0, 2)]


def test_saved_time_is_that_measured_and_in_proportion_to_the_arithmetic() -> None:
    times = Times(dense=10.0, sparse=4.0, kept=20)
    assert times.saved(20, channels=100) == 6.0
    assert times.saved(70, channels=100) == pytest.approx(1.0)
    assert times.saved(100, channels=100) == pytest.approx(-2.0)


def test_sites_that_are_slower_sparse_stay_dense(fresh_cache: None, measured: list[int]) -> None:
    model, x = compile_two_layers(constant(0.75))
    model(x).sin().sum().backward()
    assert kept_rows(model) == [64, 8]
    reasons = {site.name: site.reason for site in report(model).sites}
    assert reasons == {
        "0": "not faster sparse: 1.50 ms with 16 channels, 1.00 ms dense",
        "2": "",
    }


def test_without_a_gate_every_site_is_sparse(
    fresh_cache: None, no_code: None, measured: list[int]
) -> None:
    model, x = compile_two_layers(constant(0.75), gate=False)
    model(x).sin().sum().backward()
    assert kept_rows(model) == [16, 8]
    assert measured == []


@pytest.mark.parametrize(
    ("rate", "share"), [(0.33, "9%"), pytest.param(0.2, "-3%", marks=pytest.mark.slow)]
)
def test_drop_rates_that_do_not_pay_run_dense(
    fresh_cache: None, no_code: None, measured: list[int], rate: float, share: str
) -> None:
    # The arithmetic takes 1 ms, and drop rate 0.75 saves 0.5 ms. In proportion, 0.25 saves nothing,
    # and 0.33 saves too little to cover the costs that are not measured.
    model, x = compile_two_layers(join([constant(0.75), constant(0.37), constant(rate)], [1, 2]))
    for kept in (8, 20):
        model(x).sin().sum().backward()
        assert kept_rows(model) == [64, kept]
        model.ssprop.scheduler.step()
        model.zero_grad()
    with pytest.warns(NoEffectWarning, match=f"at drop rate {rate} .* save {share} .* runs dense"):
        model(x).sin().sum().backward()
    assert kept_rows(model) == [64, 32]


def test_times_are_kept_on_disk(fresh_cache: None, no_code: None, measured: list[int]) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        model, x = compile_two_layers(constant(0.75))
        model(x).sin().sum().backward()
        assert kept_rows(model) == [64, 8]
    assert sorted(measured) == [32, 64]


def test_selectors_without_an_identity_share_no_times(
    fresh_cache: None, no_code: None, measured: list[int]
) -> None:
    """Nothing tells one from another, so each is measured anew."""

    def select(scores: Tensor, k: int, state: object) -> Tensor:
        return topk(scores, k)

    for _ in range(2):
        torch._dynamo.reset()
        unknown = partial(select, state=object())
        assert identity_maybe(unknown) is None
        model, x = compile_two_layers(constant(0.75), select=unknown)
        model(x).sin().sum().backward()
    assert sorted(measured) == [32, 32, 64, 64]


def test_times_are_in_the_record_of_a_graph(fresh_cache: None, tmp_path: Path) -> None:
    """A warm compile cache skips the pass, and the choice between the variants needs them."""
    site = Site("0", "conv2d", 64, 1, 100, slot=0, times=Times(dense=2.0, sparse=1.0, kept=16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssprop_passes.cache_files, "cache_dir", lambda: str(tmp_path))
        save_record("key", GraphRecord([site, replace(site, times=None)], 100))
        known = load_record_maybe("key")
    assert known.sites == (site, replace(site, times=None))


@pytest.mark.slow
def test_another_highest_drop_rate_is_measured_anew(
    fresh_cache: None, no_code: None, measured: list[int]
) -> None:
    for rate in (0.75, 0.5):
        torch._dynamo.reset()
        model, x = compile_two_layers(constant(rate))
        model(x).sin().sum().backward()
    assert sorted(measured) == [32, 32, 64, 64]


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Linear(6, 32)]
)
def test_measuring_leaves_no_trace(fresh_cache: None, no_code: None, layer: nn.Module) -> None:
    """This measures real times, with random numbers that are not the model's."""
    shape = (4, 6) if isinstance(layer, nn.Linear) else (4, layer.in_channels, 6, 6)
    config = SparsityConfig(min_channels=1, targets=("conv", "depthwise", "linear"))
    model = ssprop_compile(layer, SparsityScheduler(constant(0.5)), config=config)
    torch.manual_seed(1)
    expected = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        model(torch.ones(shape)).sum().backward()
    assert torch.equal(torch.rand(3), expected[0])
    assert torch.get_num_threads() == expected[1]
    (site,) = model.ssprop.graphs[0].sites
    assert site.times.dense > 0
    assert site.times.sparse > 0
    assert site.times.kept == 16


@pytest.mark.parametrize(
    ("layer", "score"),
    [(nn.Conv2d(8, 32, 3), "l2_weight"), (nn.Linear(6, 32), "mean_abs")],
)
def test_channels_are_gathered_once_whatever_number_of_runs(
    fresh_cache: None,
    no_code: None,
    monkeypatch: pytest.MonkeyPatch,
    layer: nn.Module,
    score: object,
) -> None:
    """Eager gathers are slower than those of a compiled step, so no timed run does one."""
    gathers: list[int] = []

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        gathers.append(len(indices))
        return gather_channels(x, indices)

    monkeypatch.setattr(ssprop_passes.transforms.gate_timing, "gather_channels", gather)
    shape = (4, 6) if isinstance(layer, nn.Linear) else (4, 8, 6, 6)
    config = SparsityConfig(min_channels=1, score=score)
    model = ssprop_compile(layer, SparsityScheduler(constant(0.5)), config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        model(torch.ones(shape, requires_grad=True)).sum().backward()
    (site,) = model.ssprop.graphs[0].sites
    assert gathers == [site.times.kept] == [16]


@pytest.mark.parametrize(
    ("ms", "expected"),
    [((50, 3, 2), 2), ((2, 3, 4), 3), ((2, 30), 30), ((2, 3, 40), 3)],
    ids=["long first", "short", "long", "long last"],
)
def test_long_runs_are_repeated_less(
    monkeypatch: pytest.MonkeyPatch, ms: tuple[int, ...], expected: int
) -> None:
    """The first run does not count; of the others, the fastest counts."""
    clock, runs = [0.0], iter(ms)

    def run() -> None:
        clock[0] += next(runs) / 1e3

    monkeypatch.setattr(ssprop_passes.transforms.gate_timing.time, "perf_counter", lambda: clock[0])
    assert ssprop_passes.transforms.gate_timing._time_ms(run, torch.device("cpu")) == pytest.approx(
        expected
    )
    assert list(runs) == []


@pytest.mark.parametrize(
    "schedule",
    [
        constant(0.3),
        linear(0.1, 0.7, steps=3),
        cosine(0.6, 0.2, steps=5),
        bar(0.8, period=2),
        warmup(bar(0.4, period=2), steps=3),
        join([constant(0.1), linear(0.2, 0.5, steps=2)], [2]),
    ],
)
def test_highest_is_the_highest_of_all_steps(schedule: object) -> None:
    assert schedule.highest == max(schedule(step) for step in range(20))


def test_gate_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="gate must be True or False"):
        SparsityConfig(gate="measured")


def test_random_tensors_lie_as_those_they_stand_for() -> None:
    """No two channels are alike, although few numbers are drawn."""
    x = torch.empty(5, 8, 64, 64).to(memory_format=torch.channels_last)
    found = ssprop_passes.transforms.gate_timing._random_like(x, shares=2)
    assert found.shape == (3, 8, 64, 64)
    assert found.stride() == x.stride()
    channels = found.transpose(0, 1).flatten(1)
    assert len(channels.unique(dim=0)) == 8
    assert bool((channels.std(1) - 1).abs().max() < 0.05)
    row = ssprop_passes.transforms.gate_timing._random_like(
        torch.empty(6, 1, dtype=torch.float64).expand(6, 4)
    )
    assert (row.stride(), row.dtype) == ((1, 0), torch.float64)
