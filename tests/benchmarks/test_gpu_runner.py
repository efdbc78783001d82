"""Jobs of `gpu`: whatever becomes of one, the others run, and what was saved stays."""

import argparse
import sys
import time
from pathlib import Path

import pytest
from bench_runs import parse

from benchmarks.gpu import command
from benchmarks.gpu.runner import CUT, DONE, FAILED, Job, Outcome, run_jobs
from benchmarks.results import read

# Saves a result as stages do, then goes on with `then`.
SAVE = """
import sys, time
from dataclasses import dataclass
from benchmarks.results import save
@dataclass
class Row:
    tag: str
save([Row({tag!r})], {{}}, {folder!r}, "gpu-{name}")
{then}
"""


def job(folder: Path, name: str, then: str = "", tag: str = "", seconds: float = 1) -> Job:
    code = SAVE.format(folder=str(folder), name=name, then=then, tag=tag)
    return Job(name, seconds, (sys.executable, "-c", code))


def states(outcomes: list[Outcome]) -> dict[str, str]:
    return {outcome.stage: outcome.state for outcome in outcomes}


def tag(folder: Path, name: str) -> str:
    (row,) = read(folder / f"gpu-{name}.json")
    return row["tag"]


def test_a_job_that_fails_or_hangs_loses_nothing(tmp_path: Path) -> None:
    """One fails, one crashes, one hangs with a child, and the last one still runs."""
    hang = "import subprocess; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    jobs = [
        job(tmp_path, "hangs", hang),
        job(tmp_path, "fails", "sys.exit(3)"),
        job(tmp_path, "crashes", "import os; os.abort()"),
        job(tmp_path, "works"),
    ]
    start = time.monotonic()
    outcomes = run_jobs(jobs, 12, tmp_path)
    assert time.monotonic() - start < 20
    expected = {"hangs": CUT, "fails": FAILED, "crashes": FAILED, "works": DONE}
    assert states(outcomes) == expected
    assert [tag(tmp_path, name) for name in expected] == [""] * 4
    assert {row["stage"]: row["state"] for row in read(tmp_path / "gpu-status.json")} == expected


def test_time_that_is_left_over_goes_to_the_next(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "quick", seconds=50), job(tmp_path, "second", seconds=50)]
    quick, second = run_jobs(jobs, 100, tmp_path)
    assert quick.limit == pytest.approx(50, abs=1)
    assert second.limit == pytest.approx(100 - quick.seconds, abs=1)


def test_a_run_goes_on_with_what_is_not_done(tmp_path: Path) -> None:
    first = [job(tmp_path, "done", tag="1"), job(tmp_path, "cut", "sys.exit(1)", tag="1")]
    run_jobs(first, 60, tmp_path)
    again = [job(tmp_path, name, tag="2") for name in ("done", "cut", "new")]
    assert states(run_jobs(again, 60, tmp_path)) == dict.fromkeys(("done", "cut", "new"), DONE)
    assert [tag(tmp_path, name) for name in ("done", "cut", "new")] == ["1", "2", "2"]
    # What the job had saved before is still there.
    assert tag(tmp_path, "cut-cut1") == "1"


def test_a_run_that_is_killed_says_which_job_was_cut_off(tmp_path: Path) -> None:
    look = f"print(open({str(tmp_path / 'gpu-status.json')!r}).read())"
    run_jobs([job(tmp_path, "looks", look)], 60, tmp_path)
    assert '"state": "cut"' in (tmp_path / "gpu-looks.log").read_text()


def test_output_is_new_and_resume_is_not(tmp_path: Path) -> None:
    def run(flag: str) -> None:
        args: argparse.Namespace = parse(["gpu", flag, str(tmp_path), "--device", "cpu"])
        command.run_stages(args, [])

    with pytest.raises(ValueError, match=r"has no results: begin with --output"):
        run("--resume")
    (tmp_path / "gpu-facts.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"has results: go on with --resume"):
        run("--output")
    with pytest.raises(SystemExit):
        parse(["gpu"])


def test_what_compiles_ahead_stands_still_while_a_job_is_alone(tmp_path: Path) -> None:
    """The job looks at a counter that the other process writes, alone and not alone."""
    counter = tmp_path / "counter"
    count = f"""
import itertools, pathlib, time
for number in itertools.count():
    pathlib.Path({str(counter)!r}).write_text(str(number))
    time.sleep(0.01)
"""
    look = f"""
import pathlib, time
from benchmarks.gpu.alone import alone
def moves():
    found = set()
    for _ in range(10):
        found.add(pathlib.Path({str(counter)!r}).read_text())
        time.sleep(0.05)
    return len(found) > 2
while not pathlib.Path({str(counter)!r}).exists():
    time.sleep(0.05)
assert moves()
with alone():
    time.sleep(0.1)
    assert not moves()
assert moves()
"""
    stopped = "from benchmarks.gpu.alone import alone\nwith alone(): time.sleep(600)"
    jobs = [job(tmp_path, "hangs alone", stopped), Job("looks", 9, (sys.executable, "-c", look))]
    outcomes = run_jobs(jobs, 20, tmp_path, ahead=(sys.executable, "-c", count))
    assert states(outcomes) == {"hangs alone": CUT, "looks": DONE}
    last = counter.read_text()
    time.sleep(0.3)
    assert counter.read_text() == last, "it ends with the jobs"
