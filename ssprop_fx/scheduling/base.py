"""What schedules and controllers share: the base class, argument checks and printing."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields
from typing import Any

__all__ = [
    "Schedule",
    "as_call",
    "check_budget",
    "check_number",
    "check_rate",
    "check_schedule",
    "check_steps",
]


class Schedule(ABC):
    """A pure function from a step (int, from 0) to a drop rate in [0, 1)."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""

    @property
    @abstractmethod
    def highest(self) -> float:
        """The highest drop rate over all steps."""

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that occur; None, the default, if there are many."""
        return None


def as_call(name: str) -> Callable[[Any], str]:
    """Return a `__repr__` that prints a dataclass as a function call.

    Args:
        name: name of the function. Its parameters are the fields of the dataclass.

    Returns:
        The method.
    """

    def show(self: Any) -> str:
        values = (f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return f"{name}({', '.join(values)})"

    return show


def check_rate(name: str, rate: float) -> None:
    """Check a drop rate.

    Args:
        name: name of the argument, for the message.
        rate: its value.

    Raises:
        TypeError: `rate` is not a number.
        ValueError: `rate` is outside [0, 1).
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {rate!r}")
    if not 0.0 <= rate < 1.0:
        raise ValueError(
            f"{name} must be in [0, 1), got {rate!r}: it is the fraction of channels that the"
            " backward pass leaves out, not the percentage kept"
        )


def check_steps(name: str, steps: int, minimum: int) -> None:
    """Check a number of steps.

    Args:
        name: name of the argument, for the message.
        steps: its value.
        minimum: the smallest valid value.

    Raises:
        TypeError: `steps` is not an int.
        ValueError: `steps` is below `minimum`.
    """
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{name} must be an int, got {steps!r}")
    if steps < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {steps}")


def check_schedule(name: str, schedule: object) -> None:
    """Check a schedule that is part of another.

    Args:
        name: name of the argument, for the message.
        schedule: its value.

    Raises:
        TypeError: `schedule` is not a schedule.
    """
    if not isinstance(schedule, Schedule):
        hint = "; only SparsityScheduler takes a plain function" if callable(schedule) else ""
        raise TypeError(f"{name} must be a schedule such as constant(0.8), got {schedule!r}{hint}")


def check_budget(budget: float | None) -> None:
    """Check a budget.

    Raises:
        TypeError: it is neither a number nor None.
        ValueError: it is outside (0, 1].
    """
    if budget is not None:
        check_number("budget", budget)
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be in (0, 1] or None, got {budget!r}")


def check_number(name: str, value: object) -> None:
    """Check that an argument is a number.

    Args:
        name: name of the argument, for the message.
        value: its value.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
