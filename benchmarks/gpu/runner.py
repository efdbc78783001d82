"""Run jobs one after another, each in its own process and within its own time.

A job that fails, hangs or is cut off takes nothing from the others: what it has saved stays, and
the next one begins. `gpu-status.json` says what became of each.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.alone import AHEAD, signal_group
from benchmarks.results import read, save, table

__all__ = ["CUT", "DONE", "FAILED", "Job", "Outcome", "run_jobs"]

DONE, FAILED, CUT = "done", "failed", "cut"
_STATUS = "gpu-status"
# Lines of a job's log that are printed when it ends; the whole log is a file.
_PRINTED = 40


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: its name, also of its files.
        seconds: its share of the time.
        command: what it runs.
    """

    name: str
    seconds: float
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        stage: name of the job.
        state: `done`, `failed` or `cut`.
        seconds: its time.
        limit: the time that it had.
    """

    stage: str
    state: str
    seconds: float
    limit: float


def run_jobs(
    jobs: Sequence[Job], seconds: float, folder: Path, ahead: Sequence[str] = ()
) -> list[Outcome]:
    """Run all jobs that are not done yet.

    Each gets its share of the time, and what the jobs before it left over.

    Args:
        jobs: the jobs, the most important first.
        seconds: time for all of them.
        folder: folder of results, logs and status. If it has a status, its jobs that are done do
            not run again.
        ahead: a command that runs beside the jobs, as long as they run; see `alone`.

    Returns:
        The outcome of every job that ever ran in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = {outcome.stage: outcome for outcome in _read_status(folder)}
    left = [job for job in jobs if _state(outcomes, job) != DONE]
    scale = seconds / sum(job.seconds for job in left) if left else 0.0
    end = time.monotonic()
    with _beside(ahead, folder) as environment:
        for number, job in enumerate(left):
            end += job.seconds * scale
            print(f"\n[{number + 1}/{len(left)}] {shlex.join(job.command)}", flush=True)
            if job.name in outcomes:
                _keep_earlier(folder, job.name)
            # Written before the job begins: if all is cut off, this is what is known.
            outcomes[job.name] = Outcome(job.name, CUT, 0.0, end - time.monotonic())
            _write_status(folder, list(outcomes.values()))
            outcomes[job.name] = _run(job, end - time.monotonic(), folder, environment)
            _write_status(folder, list(outcomes.values()))
    formats = {"stage": "", "state": "", "seconds": ".0f", "limit": ".0f"}
    print(f"\n{table(list(outcomes.values()), formats)}", flush=True)
    return list(outcomes.values())


@contextlib.contextmanager
def _beside(command: Sequence[str], folder: Path) -> Iterator[dict[str, str]]:
    """Run a command beside the jobs, if there is one; yield the environment of the jobs.

    All processes share a compile cache in the folder.
    """
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder.resolve() / "cache")}
    environment = {**cache, **os.environ, "PYTHONUNBUFFERED": "1"}
    if not command:
        yield environment
        return
    with (folder / "gpu-ahead.log").open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=environment
        )
    try:
        yield {**environment, AHEAD: str(process.pid)}
    finally:
        _kill(process)


def _run(job: Job, limit: float, folder: Path, environment: Mapping[str, str]) -> Outcome:
    start = time.monotonic()
    log = folder / f"gpu-{job.name}.log"
    with log.open("a") as file:
        # A session of its own, so that its compile workers end with it.
        process = subprocess.Popen(
            job.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            state = FAILED if process.wait(limit) else DONE
        except subprocess.TimeoutExpired:
            state = CUT
        finally:
            _kill(process)
            # A job that is killed while it is alone cannot wake the others.
            signal_group(int(environment.get(AHEAD, "0")), signal.SIGCONT)
    seconds = time.monotonic() - start
    print("\n".join(log.read_text(errors="replace").splitlines()[-_PRINTED:]))
    print(f"{job.name}: {state} after {seconds:.0f} of {limit:.0f} s", flush=True)
    return Outcome(job.name, state, seconds, limit)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a job's process and all that it has started, also if it ended by itself."""
    signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _keep_earlier(folder: Path, name: str) -> None:
    """Rename the rows of a job that was cut off, because it may get less far this time."""
    path = folder / f"gpu-{name}.json"
    if path.exists():
        number = len(list(folder.glob(f"gpu-{name}-cut*.json"))) + 1
        path.rename(folder / f"gpu-{name}-cut{number}.json")


def _state(outcomes: dict[str, Outcome], job: Job) -> str:
    outcome = outcomes.get(job.name)
    return "" if outcome is None else outcome.state


def _read_status(folder: Path) -> list[Outcome]:
    path = folder / f"{_STATUS}.json"
    return [Outcome(**row) for row in read(path)] if path.exists() else []


def _write_status(folder: Path, outcomes: list[Outcome]) -> None:
    save(outcomes, {"python": sys.version.split()[0]}, folder, _STATUS)
