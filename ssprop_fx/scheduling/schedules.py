"""Schedules: pure functions from a step to a drop rate.

A schedule is a frozen dataclass with `__call__`, so that it prints as the code that makes it,
compares by value and pickles. What a step is, an iteration or an epoch, is decided by how often
`SparsityScheduler.step` is called; a schedule only counts.

Example:
    >>> schedule = warmup(bar(0.8, period=4), steps=2)
    >>> [schedule(step) for step in range(8)]
    [0.0, 0.0, 0.0, 0.0, 0.8, 0.8, 0.0, 0.0]
    >>> schedule
    warmup(schedule=bar(rate=0.8, period=4, dense_fraction=0.5), steps=2)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Schedule", "bar", "constant", "cosine", "join", "linear", "warmup"]


class Schedule(ABC):
    """A pure function from a step (int, from 0) to a drop rate in [0, 1)."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""

    @property
    @abstractmethod
    def highest(self) -> float:
        """The highest drop rate of any step."""

    @property
    @abstractmethod
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that steps have, None where they are too many to tell."""


def _union(parts: Iterable[frozenset[float] | None]) -> frozenset[float] | None:
    union: frozenset[float] = frozenset()
    for part in parts:
        if part is None:
            return None
        union |= part
    return union


def _level(rate: float) -> frozenset[float]:
    return frozenset({float(rate)} if rate else ())


def _check_rate(name: str, rate: float) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {rate!r}")
    if not 0.0 <= rate < 1.0:
        raise ValueError(
            f"{name} must be in [0, 1), got {rate!r}: it is the fraction of channels that the"
            " backward pass leaves out, not the percentage kept"
        )


def _check_steps(name: str, steps: int, minimum: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{name} must be an int, got {steps!r}")
    if steps < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {steps}")


def _check_schedule(name: str, schedule: object) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{name} must be a schedule such as constant(0.8), got {schedule!r}")


@dataclass(frozen=True)
class constant(Schedule):
    """The same drop rate at every step.

    Args:
        rate: drop rate in [0, 1).

    Raises:
        ValueError: `rate` is outside [0, 1).

    Example:
        >>> constant(0.8)(1000)
        0.8
    """

    rate: float

    def __post_init__(self) -> None:
        _check_rate("rate", self.rate)

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        return float(self.rate)

    @property
    def highest(self) -> float:
        """The highest drop rate of any step."""
        return float(self.rate)

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that steps have."""
        return _level(self.rate)


@dataclass(frozen=True)
class linear(Schedule):
    """A straight line: `start + (end - start) * min(step, steps) / steps`.

    Args:
        start: drop rate at step 0.
        end: drop rate at step `steps` and after it.
        steps: length of the ramp, at least 1.

    Raises:
        ValueError: a rate is outside [0, 1) or `steps` below 1.

    Example:
        >>> [linear(0.0, 0.5, steps=2)(step) for step in range(4)]
        [0.0, 0.25, 0.5, 0.5]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_rate("start", self.start)
        _check_rate("end", self.end)
        _check_steps("steps", self.steps, 1)

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        return self.start + (self.end - self.start) * min(step, self.steps) / self.steps

    @property
    def highest(self) -> float:
        """The highest drop rate of any step."""
        return max(self.start, self.end)

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that steps have."""
        return _level(self.start) if self.start == self.end else None


@dataclass(frozen=True)
class cosine(Schedule):
    """Half a cosine: `end + (start - end) * (1 + cos(pi * min(step, steps) / steps)) / 2`.

    The published code's cosine of the kept fraction (ssProp, arXiv 2408.12561), written for the
    drop rate.

    Args:
        start: drop rate at step 0.
        end: drop rate at step `steps` and after it.
        steps: length of the ramp, at least 1.

    Raises:
        ValueError: a rate is outside [0, 1) or `steps` below 1.

    Example:
        >>> [round(cosine(0.0, 0.8, steps=4)(step), 3) for step in range(6)]
        [0.0, 0.117, 0.4, 0.683, 0.8, 0.8]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_rate("start", self.start)
        _check_rate("end", self.end)
        _check_steps("steps", self.steps, 1)

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        if step == 0:
            return float(self.start)
        if step >= self.steps:
            return float(self.end)
        wave = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.end + (self.start - self.end) * wave

    @property
    def highest(self) -> float:
        """The highest drop rate of any step."""
        return max(self.start, self.end)

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that steps have."""
        return _level(self.start) if self.start == self.end else None


@dataclass(frozen=True)
class bar(Schedule):
    """Dense, then `rate`, in turn: the schedule that ssProp recommends (arXiv 2408.12561).

    Steps whose place in the period lies below `dense_fraction * period` have drop rate 0, the
    rest have `rate`.

    Args:
        rate: drop rate of the sparse part.
        period: steps in one dense and one sparse part together, at least 1.
        dense_fraction: share of the period that is dense, in [0, 1].

    Raises:
        ValueError: `rate` is outside [0, 1), `period` below 1, or `dense_fraction` outside [0, 1].

    Example:
        >>> [bar(0.8, period=4)(step) for step in range(6)]
        [0.0, 0.0, 0.8, 0.8, 0.0, 0.0]
    """

    rate: float
    period: int
    dense_fraction: float = 0.5

    def __post_init__(self) -> None:
        _check_rate("rate", self.rate)
        _check_steps("period", self.period, 1)
        if not isinstance(self.dense_fraction, (int, float)) or isinstance(
            self.dense_fraction, bool
        ):
            raise TypeError(f"dense_fraction must be a number, got {self.dense_fraction!r}")
        if not 0.0 <= self.dense_fraction <= 1.0:
            raise ValueError(f"dense_fraction must be in [0, 1], got {self.dense_fraction!r}")

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        # Rounded, because 0.28 * 25 is a little more than 7 in floating point.
        dense_steps = math.ceil(round(self.dense_fraction * self.period, 9))
        return 0.0 if step % self.period < dense_steps else float(self.rate)

    @property
    def highest(self) -> float:
        """The highest drop rate of any step."""
        return float(self.rate)

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that steps have."""
        return _level(self.rate)


@dataclass(frozen=True)
class warmup(Schedule):
    """Dense for `steps` steps, then `schedule`, which starts at its own step 0.

    Args:
        schedule: what follows the dense steps.
        steps: number of dense steps, at least 0.

    Raises:
        TypeError: `schedule` is not a schedule.
        ValueError: `steps` is negative.

    Example:
        >>> [warmup(constant(0.8), steps=2)(step) for step in range(4)]
        [0.0, 0.0, 0.8, 0.8]
    """

    schedule: Schedule
    steps: int

    def __post_init__(self) -> None:
        _check_schedule("schedule", self.schedule)
        _check_steps("steps", self.steps, 0)

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        return 0.0 if step < self.steps else self.schedule(step - self.steps)

    @property
    def highest(self) -> float:
        """The highest drop rate of any step."""
        return self.schedule.highest

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that steps have."""
        return self.schedule.levels


@dataclass(frozen=True)
class join(Schedule):
    """One schedule after another; each starts at its own step 0.

    Args:
        schedules: the parts, at least one.
        boundaries: the step at which each part after the first begins, strictly increasing: one
            fewer than `schedules`.

    Raises:
        TypeError: a part is not a schedule.
        ValueError: the numbers of parts and boundaries do not fit, or boundaries do not increase.

    Example:
        >>> halves = join([constant(0.2), constant(0.8)], boundaries=[2])
        >>> [halves(step) for step in range(4)]
        [0.2, 0.2, 0.8, 0.8]
    """

    schedules: Sequence[Schedule]
    boundaries: Sequence[int]

    def __post_init__(self) -> None:
        for name in ("schedules", "boundaries"):
            value = getattr(self, name)
            if not isinstance(value, Iterable):
                raise TypeError(f"{name} must be a sequence, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for schedule in self.schedules:
            _check_schedule("schedules", schedule)
        if len(self.schedules) != len(self.boundaries) + 1:
            raise ValueError(
                f"boundaries must have one entry fewer than schedules, got {len(self.boundaries)}"
                f" for {len(self.schedules)} schedules"
            )
        for boundary in self.boundaries:
            _check_steps("boundaries", boundary, 1)
        if any(a >= b for a, b in zip(self.boundaries, self.boundaries[1:], strict=False)):
            raise ValueError(f"boundaries must increase, got {self.boundaries}")

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        part = sum(step >= boundary for boundary in self.boundaries)
        start = self.boundaries[part - 1] if part else 0
        return self.schedules[part](step - start)

    @property
    def highest(self) -> float:
        """The highest drop rate of any step."""
        return max(schedule.highest for schedule in self.schedules)

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that steps have."""
        return _union(schedule.levels for schedule in self.schedules)
