"""The compile cache: a second process compiles no sparse graph, and knows its sites."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import itertools, json, sys
import torch
from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_passes.transforms.sparse_backward import SparseBackwardPass
from torch import nn

runs = []
transform = SparseBackwardPass.transform
SparseBackwardPass.transform = lambda self, graph: (runs.append(1), transform(self, graph))


def own(factor):
    return lambda scores, k: torch.topk(scores * factor, k).indices


count = itertools.count()  # what it holds cannot be known
selectors = {
    "topk": "topk",
    "random": "random",
    "sampled": "sampled",
    "own": own(1),
    "other": own(-1),
    "stateful": lambda scores, k: torch.topk(scores * (1 + next(count)), k).indices,
}


def train(rate, filter_first, select, memory):
    runs.clear()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    config = SparsityConfig(
        channel_multiple=1,
        min_channels=1,
        filter_fn=(lambda module, name: name != "0") if filter_first else None,
        select=selectors[select],
        memory=memory,
        specialize=False,  # so that one artifact serves several drop rates
        gate=False,
    )
    compiled = ssprop_compile(model, SparsityScheduler(constant(rate)), config=config)
    for x in torch.randn(2, 2, 3, 12, 12):
        model.zero_grad()
        compiled(x).square().sum().backward()
    return {
        "pass_runs": len(runs),
        "cache_hits": counters["aot_autograd"]["autograd_cache_hit"],
        "sites": [[site.name, site.kept, site.reason] for site in report(compiled).sites],
        "gradients": [p.grad.double().sum().item() for p in model.parameters()],
        "rows": [int((model[i].weight.grad.flatten(1).abs().sum(1) > 0).sum()) for i in (0, 3)],
    }


print(json.dumps([train(**options) for options in json.loads(sys.argv[1])]))
"""
DEFAULTS = {"rate": 0.5, "filter_first": False, "select": "topk", "memory": 0.0}


def run_all(cache: Path, *changes: dict, **env: str) -> list[dict]:
    """Train once for each change of the defaults, all in one new process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([{**DEFAULTS, **one} for one in changes])],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def run(cache: Path, **changes: object) -> dict:
    (found,) = run_all(cache, changes)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cold(cache: Path) -> dict:
    return run(cache)


def test_a_cold_cache_runs_the_pass(cold: dict) -> None:
    assert (cold["pass_runs"], cold["cache_hits"]) == (1, 0)
    assert cold["sites"] == [["3", 8, ""], ["0", 8, ""]]


@pytest.fixture(scope="module")
def later(cache: Path, cold: dict) -> list[dict]:
    """The same, another drop rate and another configuration, in another process."""
    return run_all(cache, {}, {"rate": 0.75}, {"filter_first": True})


def test_a_warm_cache_gives_the_same_without_the_pass(cold: dict, later: list[dict]) -> None:
    warm = later[0]
    assert (warm["pass_runs"], warm["cache_hits"]) == (0, 1)
    assert warm["gradients"] == cold["gradients"]
    assert warm["sites"] == cold["sites"]


def test_a_warm_cache_serves_another_drop_rate(later: list[dict]) -> None:
    warm = later[1]
    assert (warm["pass_runs"], warm["rows"]) == (0, [4, 4])


def test_another_configuration_misses_the_cache(later: list[dict]) -> None:
    other = later[2]
    assert other["pass_runs"] == 1
    assert other["rows"] == [16, 8]
    assert other["sites"] == [["3", 8, ""], ["0", 16, "filtered out by filter_fn"]]


@pytest.mark.slow
def test_a_random_selector_draws_the_same_from_the_cache(cache: Path, cold: dict) -> None:
    first, warm = (run(cache, select="random") for _ in range(2))
    assert (first["pass_runs"], warm["pass_runs"], warm["cache_hits"]) == (1, 0, 1)
    assert first["gradients"] == warm["gradients"] != cold["gradients"]


@pytest.mark.slow
def test_a_memory_works_from_the_cache(cache: Path, cold: dict) -> None:
    first, warm, other = (run(cache, memory=eta) for eta in (0.9, 0.9, 0.5))
    assert (first["pass_runs"], warm["pass_runs"], warm["cache_hits"]) == (1, 0, 1)
    assert first["gradients"] == warm["gradients"]
    assert first["sites"] == warm["sites"] == cold["sites"]
    assert len({tuple(one["gradients"]) for one in (first, other, cold)}) == 3


@pytest.mark.slow
def test_a_selector_is_known_by_what_it_computes(cache: Path) -> None:
    own, warm, other, stateful, again = (
        run(cache, select=select) for select in ("own", "own", "other", "stateful", "stateful")
    )
    assert (warm["pass_runs"], warm["cache_hits"]) == (0, 1)
    assert own["gradients"] == warm["gradients"] != other["gradients"]
    assert own["pass_runs"] == other["pass_runs"] == 1
    # A selector with unknown state is not cached.
    assert [(one["pass_runs"], one["cache_hits"]) for one in (stateful, again)] == [(1, 0)] * 2


@pytest.mark.slow
def test_caches_off_give_the_same(cache: Path, cold: dict) -> None:
    (off,) = run_all(cache, {}, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert off["pass_runs"] == 1
    assert off["gradients"] == cold["gradients"]


@pytest.mark.slow
def test_a_cache_without_our_records_still_knows_its_sites(cache: Path, cold: dict) -> None:
    for record in (cache / "ssprop").iterdir():
        record.unlink()
    other = run(cache)
    assert other["pass_runs"] == 1
    assert other["sites"] == cold["sites"]
    assert other["gradients"] == cold["gradients"]
