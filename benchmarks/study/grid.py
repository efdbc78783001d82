"""The grids by name, and their settings in the order of their runs."""

from benchmarks.study.gpu import GPU
from benchmarks.study.small import SMALL
from benchmarks.study.task import Setting, Task

__all__ = ["GRIDS", "settings"]

GRIDS: dict[str, tuple[Task, ...]] = {"small": SMALL, "gpu": GPU}


def settings(grid: str) -> list[Setting]:
    """Return the settings of a grid, in the order of their runs."""
    return [
        Setting(task, name, {**task.flags, **flags})
        for task in GRIDS[grid]
        for name, flags in task.settings.items()
    ]
