"""`step --axis sample`: rows, formulas, the peer, and the process of another checkout."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bench_runs import parse, rows_of
from torch import Tensor, nn

from benchmarks import machine, samples
from benchmarks.markdown import samples_markdown
from benchmarks.phases import OtherCheckout, OtherStep, PhasedStep
from benchmarks.sample_row import Phases, SampleRow, sample_bound
from benchmarks.selective import SELECTIVE, selective_variants
from benchmarks.variants import Variant
from benchmarks.workload import Workload

ROOT = Path(machine.__file__).parents[1]
DIGITS = Workload(model="digits", batch_size=4, img_size=8, device="cpu", backend="aot_eager")


def build(workload: Workload) -> tuple[nn.Module, Tensor]:
    """Return a small model for images of the size of scikit-learn's digits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    return model, torch.randn(workload.batch_size, 3, workload.img_size, workload.img_size)


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "build", build)


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["step", "--axis", "sample", "--model", "digits", "--backend", "aot_eager"]
    command += ["--device", "cpu", "--batch-size", "4", "--img-size", "8", "--rounds", "2"]
    command += ["--drop-rates", "0", "0.5", "0.4", "--peers", "--cpu-time"]
    args = parse([*command, "--variant", "select=random", "--output", str(tmp_path)])
    args.run(args)
    rows = rows_of(tmp_path, SampleRow)
    both = [(0.5, 2), (0.4, 2)]
    names = ("sliced", "two passes", "sliced select=random")
    assert [(row["variant"], row["drop_rate"], row["kept"]) for row in rows] == [
        ("dense", 0.0, 4),
        ("sliced", 0.0, 4),
        *((name, *kept) for name in (*names, *SELECTIVE) for kept in both),
    ]
    for row in rows:
        assert row["low_ms"] <= row["step_ms"] <= row["high_ms"]
        assert min(row["forward_ms"], row["backward_ms"], row["peak_mib"], row["first_s"]) > 0
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["share"] == row["speedup"] / row["bound"]
        assert row["clock"] == "processor time"
    dense = rows[0]
    assert (dense["speedup"], dense["bound"]) == (1, 1)
    forward, backward = dense["forward_ms"], dense["backward_ms"]
    assert rows[2]["bound"] == sample_bound(forward, backward, 0.5)
    assert (tmp_path / "samples-digits-8-b4-fp32-channels_last.json").exists()
    printed = capsys.readouterr().out
    assert "note: drop rate 0.4 keeps 2 of 4 samples" in printed
    assert "note: drop rate 0.5" not in printed
    assert "processor time, medians of 2 rounds" in printed


def test_bound() -> None:
    # A backward of no samples leaves the forward.
    assert sample_bound(30, 60, 0) == 3
    assert sample_bound(30, 60, 1) == 1


def test_a_row_takes_the_ratios_of_the_rounds() -> None:
    dense, sliced = Phases.of([(30, 60), (60, 120)]), Phases.of([(30, 30), (60, 60)])
    row = SampleRow.of(DIGITS, "sliced", 0.5, 2, sliced, dense, 1.0, 2.0, "wall time")
    assert (row.forward_ms, row.backward_ms, row.step_ms) == (45, 45, 90)
    assert row.speedup == row.speedup_low == row.speedup_high == 1.5
    assert (row.bound, row.share) == (1.5, 1)


def test_the_phases_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Iterator[float] = iter([1.0, 1.25, 2.0])
    weight = nn.Parameter(torch.ones(2))
    owner = nn.Module()
    owner.weight = weight
    variant = Variant("v", 0.0, owner, lambda: (2 * weight).sum().backward())
    step = PhasedStep(variant, "cpu", lambda: next(clock))
    step()
    assert step.phases == [(250, 750)]
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2]
    # After a step `backward` is torch's own.
    assert torch.Tensor.backward.__module__ == "torch._tensor"
    assert step.peak_mib() > 0


def test_selective_backprop_is_the_step_of_the_largest_losses() -> None:
    model, images = DIGITS.build()
    images *= torch.tensor([1.0, 9.0, 2.0, 8.0]).view(4, 1, 1, 1)
    variants = list(selective_variants(DIGITS, model, images, [0.5]))
    assert [variant.name for variant in variants] == [*SELECTIVE]
    chosen = DIGITS.losses(model, images).topk(2).indices
    model.zero_grad()
    DIGITS.step(model, images[chosen])
    expected = [parameter.grad for parameter in model.parameters()]
    for variant in variants:
        variant.step()
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_one_compile_of_the_peer_serves_all_drop_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    real = torch._dynamo.backends.registry.lookup_backend("eager")

    def count(gm: torch.fx.GraphModule, inputs: list) -> object:
        captured.append(1)
        return real(gm, inputs)

    monkeypatch.setattr("benchmarks.selective.lookup_backend", lambda _: count)
    torch._dynamo.reset()
    model, images = build(Workload(model="digits", batch_size=12, img_size=8))
    for variant in selective_variants(DIGITS, model, images, [0.25, 0.5, 0.75]):
        variant.step()
    # The forward without gradients, and the forward with them.
    assert len(captured) == 2


def test_another_checkout_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other checkout is this one, in a second process."""
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    workload = Workload(
        model="test_resnet", batch_size=4, img_size=32, device="cpu", backend="aot_eager"
    )
    with OtherCheckout(ROOT, workload, [0.5], "processor time") as checkout:
        assert checkout.name == "commit abc"
        step = OtherStep(checkout, 0.5)
        step()
        step()
        assert len(step.phases) == 2
        assert min(min(phases) for phases in step.phases) > 0
        assert step.peak_mib() > 0


def test_an_error_in_another_checkout_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="the process of the other checkout ended"):
        OtherCheckout(ROOT, DIGITS, [0.5], "wall time")


def test_no_drop_rate_is_an_error() -> None:
    args = parse(["step", "--axis", "sample", "--drop-rates", "0"])
    with pytest.raises(ValueError, match="--drop-rates must have one above 0"):
        args.run(args)


def test_the_configurations_choose_samples() -> None:
    assert {config.axis for config in samples.CONFIGS.values()} == {"sample"}
    assert [config.saved for config in samples.CONFIGS.values()] == ["all", "kept"]


def test_table() -> None:
    def record(variant: str, drop_rate: float, backward_ms: float, speedup: float) -> dict:
        phases = {"forward_ms": 10.0, "backward_ms": backward_ms, "peak_mib": 5.0}
        bound = sample_bound(10, 20, 1 - drop_rate)
        figures = {"drop_rate": drop_rate, "speedup": speedup, "bound": bound}
        return {"model": "m", "variant": variant, **figures, **phases}

    rows = [record("dense", 0, 20, 1), record("sliced", 0, 20, 1), record("sliced", 0.5, 11, 1.4)]
    assert samples_markdown([rows]).splitlines() == [
        "| model, resolution, batch | variant | 0.5 | forward ms | backward ms | peak MiB |",
        "| --- | --- | --- | --- | --- | --- |",
        "| m | dense |  | 10 | 20 | 5 |",
        "| m | bound | 1.50 |  |  |  |",
        "| m | sliced | 1.40 | 10 | 11 | 5 |",
    ]
