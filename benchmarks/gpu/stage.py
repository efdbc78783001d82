"""Stage: a part of a run that has a process and a share of the time of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.settings import Settings

__all__ = ["Stage"]


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its name, also of its files.
        seconds: its share of ten minutes.
        run: runs it; is given the settings and the name.
    """

    name: str
    seconds: int
    run: Callable[[Settings, str], None]
