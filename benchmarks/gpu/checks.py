"""Stages of tests: gradients against the oracle, and all tests that need a GPU."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.settings import Settings
from benchmarks.results import table

__all__ = ["GRADIENTS", "TestRow", "run_gradients", "run_tests"]

_ROOT = Path(__file__).parents[2]
GRADIENTS = "tests/runtime/test_device_gradients.py"


@dataclass(frozen=True)
class TestRow:
    """One test.

    Attributes:
        test: its name.
        outcome: `passed`, `failed` or `skipped`.
        seconds: its time.
        message: why it failed or was skipped, in one line.
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
    chosen = ["-k", settings.device] if not settings.is_tiny else ["-k", "cpu and sliced and bf16"]
    marked = "gpu" if settings.is_cuda else "slow"
    _run(settings, name, ["-m", marked, *chosen, GRADIENTS])


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
    return path != _ROOT / GRADIENTS and "@pytest.mark.gpu" in path.read_text()


def _run(settings: Settings, name: str, arguments: list[str]) -> None:
    report = settings.folder.resolve() / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "-v", f"--junitxml={report}", *arguments]
    status = subprocess.run(command, cwd=_ROOT, check=False).returncode
    rows = [_row(case) for case in ElementTree.parse(report).iter("testcase")]
    report.unlink()
    settings.save(rows, name)
    print(table(rows, {"outcome": "", "seconds": ".1f", "test": ""}))
    if status:
        raise RuntimeError(f"pytest ended with status {status}")


def _row(case: ElementTree.Element) -> TestRow:
    outcome, message = "passed", ""
    for child, named in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        if (found := case.find(child)) is not None:
            outcome, message = named, found.get("message", "").partition("\n")[0]
    return TestRow(case.get("name", ""), outcome, float(case.get("time", 0)), message)
