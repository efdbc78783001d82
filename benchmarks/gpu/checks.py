"""Stages of tests: gradients against the oracle, and all tests that need a GPU."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.gpu.settings import Settings
from benchmarks.results import table

__all__ = ["GRADIENTS", "TestRow", "run_gradients", "run_tests"]

_ROOT = Path(__file__).parents[2]
GRADIENTS = _ROOT / "tests/runtime/test_device_gradients.py"


@dataclass(frozen=True)
class TestRow:
    """One test.

    Attributes:
        test: its name.
        outcome: `passed`, `failed` or `skipped`.
        seconds: its time.
        message: why it failed or was skipped: the last line of what pytest says.
    """

    test: str
    outcome: str
    seconds: float
    message: str


def run_gradients(settings: Settings, name: str) -> None:
    """Compare gradients of channels and of samples with the oracle, on the device.

    Raises:
        RuntimeError: a test failed.
    """
    chosen = "cpu and sliced and bf16" if settings.is_tiny else settings.device
    marked = "gpu" if settings.is_cuda else "slow"
    _run(settings, name, ["-m", marked, "-k", chosen, str(GRADIENTS)])


def run_tests(settings: Settings, name: str) -> None:
    """Run all tests that need a GPU; in a rehearsal, collect them.

    Raises:
        RuntimeError: a test failed.
    """
    rehearsal = ["--collect-only"] if settings.is_tiny else []
    # No other files: some need packages that the machine may lack.
    files = [str(p) for p in (_ROOT / "tests").rglob("test_*.py") if _has_marker(p)]
    _run(settings, name, ["-m", "gpu", *rehearsal, *files])


def _has_marker(path: Path) -> bool:
    return path != GRADIENTS and "@pytest.mark.gpu" in path.read_text()


class _Recorder:
    """A plugin of pytest: saves the rows after each test."""

    def __init__(self, settings: Settings, name: str) -> None:
        self.settings = settings
        self.name = name
        self.rows: list[TestRow] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a row for a test's call, or for a set-up that failed or skipped."""
        if report.when != "call" and report.passed:
            return
        message = str(report.longrepr).splitlines()[-1] if report.longrepr else ""
        test = report.nodeid.rpartition("::")[2]
        self.rows.append(TestRow(test, report.outcome, report.duration, message))
        self.settings.save(self.rows, self.name)


def _run(settings: Settings, name: str, arguments: list[str]) -> None:
    recorder = _Recorder(settings, name)
    status = pytest.main(
        ["-v", "-c", str(_ROOT / "pyproject.toml"), *arguments], plugins=[recorder]
    )
    settings.save(recorder.rows, name)
    print(table(recorder.rows, {"outcome": "", "seconds": ".1f", "test": ""}))
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest ended with status {status}")
