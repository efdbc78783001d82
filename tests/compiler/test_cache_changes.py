"""The compile cache: what must miss it, what must hit it, and processes that share it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ssprop_passes
from cache_cases import CASES
from sources import ROOT

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests/support/cache_cases.py"


def start(cache: Path, *args: str, **env: str) -> subprocess.Popen:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), **env}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> dict[str, dict]:
    try:
        output, errors = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def run(cache: Path, *cases: str, **env: str) -> dict[str, dict]:
    return finish(start(cache, *cases, **env))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def off(cache: Path) -> dict[str, dict]:
    """Every case with the caches off; only the C++ compiler's results stay behind."""
    found = run(cache, *CASES, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1")
    assert [one["hits"] for one in found.values()] == [0] * len(CASES)
    return found


@pytest.fixture(scope="module")
def cold(cache: Path, off: dict[str, dict]) -> dict[str, dict]:
    """Every case, one after another, with one cache that starts empty."""
    return run(cache, *CASES)


@pytest.fixture(scope="module")
def warm(cache: Path, cold: dict[str, dict]) -> dict[str, dict]:
    """Every case again, in another order, in another process."""
    return run(cache, *reversed(CASES))


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_do_not_depend_on_the_cache(
    case: str, off: dict[str, dict], cold: dict[str, dict], warm: dict[str, dict]
) -> None:
    for field in ("gradients", "sites", "rows"):
        assert cold[case][field] == warm[case][field] == off[case][field]


def test_cases_differ_in_their_gradients(off: dict[str, dict]) -> None:
    # Telemetry and constants make another graph with the same gradients.
    found = {case: tuple(one["gradients"]) for case, one in off.items()}
    assert found.pop("telemetry") == found["plain"]
    assert found.pop("constants") == found["plain"]
    assert found.pop("another multiple") == found["plain"], "0.25 of 8, rounded to 4"
    assert found.pop("other constants") == found["another rate"]
    # So do other slots: keep counts follow the layers' names.
    assert found.pop("later slots") == found["rates by layer"]
    assert found.pop("swapped slots") == found["rates by layer"]
    assert len(set(found.values())) == len(found)
    for case in ("rates by layer", "later slots", "swapped slots"):
        assert off[case]["rows"] == {"first": 4, "second": 2}


@pytest.mark.parametrize("case", CASES)
def test_a_change_misses_the_cache_unless_the_code_is_the_same(
    case: str, cold: dict[str, dict], warm: dict[str, dict]
) -> None:
    if CASES[case].config.get("axis") == "sample":
        # AOTAutograd's cache would skip the slicing, so it is off; Inductor's has all the code.
        is_new = not CASES[case].shares
        assert (cold[case]["code_hits"], cold[case]["code_misses"]) == (
            (0, 2) if is_new else (2, 0)
        )
        assert (warm[case]["code_hits"], warm[case]["code_misses"]) == (2, 0)
        return
    is_shared = bool(CASES[case].shares)
    assert (cold[case]["pass_runs"], cold[case]["hits"]) == ((0, 1) if is_shared else (1, 0))
    assert (warm[case]["pass_runs"], warm[case]["hits"]) == (0, 1)


# Keeps the weakest channels instead of the strongest.
EDIT = """

def _weakest(grad_output, weight):
    return -mean_abs(grad_output, weight)


SCORES["l2"] = _weakest
"""


def test_another_version_of_the_passes_misses_the_cache(
    cache: Path, cold: dict[str, dict], tmp_path: Path
) -> None:
    passes = Path(ssprop_passes.__file__).parent
    shutil.copytree(passes, tmp_path / "ssprop_passes")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    same = run(cache, "plain", PYTHONPATH=path)["plain"]
    assert (same["pass_runs"], same["gradients"]) == (0, cold["plain"]["gradients"])
    with (tmp_path / "ssprop_passes" / "selection" / "scores.py").open("a") as file:
        file.write(EDIT)
    edited, again = (run(cache, "plain", PYTHONPATH=path)["plain"] for _ in range(2))
    assert (edited["pass_runs"], again["pass_runs"]) == (1, 0)
    assert edited["gradients"] == again["gradients"] != cold["plain"]["gradients"]
    back = run(cache, "plain")["plain"]
    assert (back["pass_runs"], back["gradients"]) == (0, cold["plain"]["gradients"])


def test_processes_that_start_cold_together(tmp_path: Path, off: dict[str, dict]) -> None:
    cases = ("plain", "swapped slots")
    (tmp_path / "meet").mkdir()
    meet = ("--meet", str(tmp_path / "meet"), "2")
    both = [start(tmp_path / "cache", *meet, *cases) for _ in range(2)]
    found = [finish(process) for process in both]
    warm = run(tmp_path / "cache", *cases)
    for case in cases:
        assert sum(one[case]["pass_runs"] for one in found) >= 1
        assert (warm[case]["pass_runs"], warm[case]["hits"]) == (0, 1)
        for one in (*found, warm):
            for field in ("gradients", "sites", "rows"):
                assert one[case][field] == off[case][field]
