"""The parts of a grid: tasks and their settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Setting", "Task"]


@dataclass(frozen=True)
class Task:
    """What all settings of one table have in common.

    Attributes:
        name: name of the table.
        about: description for the page.
        flags: settings of `TrainConfig`.
        settings: name -> flags that differ. Names that begin with "dense" form the curve that the
            others are compared with.
        classes: classes of CIFAR-10; none for scikit-learn's digits.
        per_class: training images of each class.
        start: setting of the task "start" whose weights its runs start from.
        starts: setting -> its own `start`, if it differs.
    """

    name: str
    about: str
    flags: Mapping[str, Any]
    settings: Mapping[str, Mapping[str, Any]]
    classes: tuple[str, ...] = ()
    per_class: int = 0
    start: str | None = None
    starts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    Attributes:
        task: the table.
        name: name of the row.
        flags: settings of `TrainConfig`: the task's, then its own.
    """

    task: Task
    name: str
    flags: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Its name in the whole grid."""
        return f"{self.task.name}/{self.name}"

    @property
    def start(self) -> str | None:
        """Setting of the task "start" whose weights it starts from."""
        return self.task.starts.get(self.name, self.task.start)

    @property
    def is_start(self) -> bool:
        """Whether other runs start from its weights."""
        return self.task.name == "start"
