"""Alone on the machine: while a step is timed, compiles for later stages stand still."""

import contextlib
import os
import signal
from collections.abc import Iterator

__all__ = ["AHEAD", "alone", "signal_group"]

# Environment variable with the process group that compiles ahead.
AHEAD = "BENCHMARK_AHEAD"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Stop the processes that compile ahead, if there are any, for the time of a `with` block.

    Keep compiles out of the block: a stopped process may hold a lock of the compile cache.
    """
    group = int(os.environ.get(AHEAD, "0"))
    signal_group(group, signal.SIGSTOP)
    try:
        yield
    finally:
        signal_group(group, signal.SIGCONT)


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to a process group, if it still exists; 0 is none."""
    if group:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
