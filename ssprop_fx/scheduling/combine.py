"""Schedules made from other schedules: `warmup` and `join`.

Examples:
    >>> from ssprop_fx import bar
    >>> schedule = warmup(bar(0.8, period=4), steps=2)
    >>> [schedule(step) for step in range(8)]
    [0.0, 0.0, 0.0, 0.0, 0.8, 0.8, 0.0, 0.0]
    >>> schedule
    warmup(schedule=bar(rate=0.8, period=4, dense_fraction=0.5), steps=2)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ssprop_fx.scheduling.base import Schedule, as_call, check_schedule, check_steps

__all__ = ["join", "warmup"]


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """Return `steps` dense steps, then `schedule`, which starts at its own step 0.

    Args:
        schedule: the schedule that follows the dense steps.
        steps: number of dense steps, at least 0.

    Raises:
        TypeError: `schedule` is not a schedule, or `steps` is not an int.
        ValueError: `steps` is negative.

    Examples:
        >>> from ssprop_fx import constant
        >>> [warmup(constant(0.8), steps=2)(step) for step in range(4)]
        [0.0, 0.0, 0.8, 0.8]
    """
    return WarmupSchedule(schedule, steps)


@dataclass(frozen=True)
class WarmupSchedule(Schedule):
    """What `warmup` returns."""

    schedule: Schedule
    steps: int

    __repr__ = as_call("warmup")

    def __post_init__(self) -> None:
        check_schedule("schedule", self.schedule)
        check_steps("steps", self.steps, 0)

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        return 0.0 if step < self.steps else self.schedule(step - self.steps)

    @property
    def highest(self) -> float:
        """The highest drop rate over all steps."""
        return self.schedule.highest

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that occur; None if there are many."""
        return self.schedule.levels


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Return one schedule after another; each starts at its own step 0.

    Args:
        schedules: the parts, at least one.
        boundaries: the step at which each part after the first begins; strictly increasing, one
            entry fewer than `schedules`.

    Raises:
        TypeError: a part is not a schedule, or an argument is not a sequence.
        ValueError: the numbers of parts and boundaries do not fit, or boundaries do not increase.

    Examples:
        >>> from ssprop_fx import constant
        >>> halves = join([constant(0.2), constant(0.8)], boundaries=[2])
        >>> [halves(step) for step in range(4)]
        [0.2, 0.2, 0.8, 0.8]
    """
    for name, value in (("schedules", schedules), ("boundaries", boundaries)):
        if not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a sequence, got {value!r}")
    return JoinSchedule(tuple(schedules), tuple(boundaries))


@dataclass(frozen=True)
class JoinSchedule(Schedule):
    """What `join` returns."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    __repr__ = as_call("join")

    def __post_init__(self) -> None:
        for schedule in self.schedules:
            check_schedule("schedules", schedule)
        if len(self.schedules) != len(self.boundaries) + 1:
            raise ValueError(
                f"boundaries must have one entry fewer than schedules, got {len(self.boundaries)}"
                f" for {len(self.schedules)} schedules"
            )
        for boundary in self.boundaries:
            check_steps("boundaries", boundary, 1)
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"boundaries must increase, got {self.boundaries}")

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        part = sum(step >= boundary for boundary in self.boundaries)
        start = self.boundaries[part - 1] if part else 0
        return self.schedules[part](step - start)

    @property
    def highest(self) -> float:
        """The highest drop rate over all steps."""
        return max(schedule.highest for schedule in self.schedules)

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that occur."""
        parts = [schedule.levels for schedule in self.schedules]
        known = [part for part in parts if part is not None]
        return frozenset().union(*known) if len(known) == len(parts) else None
