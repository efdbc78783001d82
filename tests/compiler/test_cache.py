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
options = json.loads(sys.argv[1])
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
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
filter_fn = (lambda module, name: name != "0") if options["filter"] else None
config = SparsityConfig(
    channel_multiple=1,
    min_channels=1,
    filter_fn=filter_fn,
    select=selectors[options["select"]],
    memory=options["memory"],
    specialize=False,  # so that one artifact serves several drop rates
    gate=False,
)
scheduler = SparsityScheduler(constant(options["rate"]))
compiled = ssprop_compile(model, scheduler, config=config)
for x in torch.randn(2, 2, 3, 12, 12):
    model.zero_grad()
    compiled(x).square().sum().backward()
counters = torch._dynamo.utils.counters
print(json.dumps({
    "pass_runs": len(runs),
    "cache_hits": counters["aot_autograd"]["autograd_cache_hit"],
    "sites": [[site.name, site.kept, site.reason] for site in report(compiled).sites],
    "gradients": [p.grad.double().sum().item() for p in model.parameters()],
    "rows": [int((model[i].weight.grad.flatten(1).abs().sum(1) > 0).sum()) for i in (0, 3)],
}))
"""


def run(
    cache: Path,
    rate: float = 0.5,
    filter_first: bool = False,
    select: str = "topk",
    memory: float = 0.0,
    **env: str,
) -> dict:
    options = {"rate": rate, "filter": filter_first, "select": select, "memory": memory}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(options)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cold(cache: Path) -> dict:
    return run(cache)


def test_a_cold_cache_runs_the_pass(cold: dict) -> None:
    assert (cold["pass_runs"], cold["cache_hits"]) == (1, 0)
    assert cold["sites"] == [["3", 8, ""], ["0", 8, ""]]


def test_a_warm_cache_gives_the_same_without_the_pass(cache: Path, cold: dict) -> None:
    warm = run(cache)
    assert (warm["pass_runs"], warm["cache_hits"]) == (0, 1)
    assert warm["gradients"] == cold["gradients"]
    assert warm["sites"] == cold["sites"]


def test_a_warm_cache_serves_another_drop_rate(cache: Path, cold: dict) -> None:
    warm = run(cache, rate=0.75)
    assert (warm["pass_runs"], warm["rows"]) == (0, [4, 4])


def test_another_configuration_misses_the_cache(cache: Path, cold: dict) -> None:
    other = run(cache, filter_first=True)
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
    off = run(cache, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
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
