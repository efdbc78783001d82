"""Schedules: pure functions from a step to a drop rate.

Each public function returns a frozen dataclass with `__call__`. It prints as the function call,
compares by value and pickles. A step is an iteration or an epoch, depending on how often you call
`SparsityScheduler.step`.

Examples:
    >>> schedule = bar(0.8, period=4)
    >>> [schedule(step) for step in range(6)]
    [0.0, 0.0, 0.8, 0.8, 0.0, 0.0]
    >>> schedule
    bar(rate=0.8, period=4, dense_fraction=0.5)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ssprop_fx.scheduling.base import Schedule, as_call, check_rate, check_steps

# The public functions: `ssprop_fx` exports them all.
__all__ = [
    "bar",
    "constant",
    "cosine",
    "linear",
]


def constant(rate: float) -> Schedule:
    """Return a schedule with the same drop rate at every step.

    Args:
        rate: drop rate in [0, 1).

    Raises:
        TypeError: `rate` is not a number.
        ValueError: `rate` is outside [0, 1).

    Examples:
        >>> constant(0.8)(1000)
        0.8
    """
    return ConstantSchedule(rate)


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """What `constant` returns."""

    rate: float

    __repr__ = as_call("constant")

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        return float(self.rate)

    @property
    def highest(self) -> float:
        """The highest drop rate over all steps."""
        return float(self.rate)

    @property
    def levels(self) -> frozenset[float]:
        """All drop rates above 0 that occur."""
        return _level(self.rate)


def linear(start: float, end: float, steps: int) -> Schedule:
    """Return a straight line: `start + (end - start) * min(step, steps) / steps`.

    Args:
        start: drop rate at step 0.
        end: drop rate at step `steps` and after it.
        steps: length of the ramp, at least 1.

    Raises:
        TypeError: a rate is not a number, or `steps` not an int.
        ValueError: a rate is outside [0, 1) or `steps` below 1.

    Examples:
        >>> [linear(0.0, 0.5, steps=2)(step) for step in range(4)]
        [0.0, 0.25, 0.5, 0.5]
    """
    return LinearSchedule(start, end, steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Return half a cosine: `end + (start - end) * (1 + cos(pi * min(step, steps) / steps)) / 2`.

    The published code applies this cosine to the kept fraction (ssProp, arXiv 2408.12561); here it
    applies to the drop rate.

    Args:
        start: drop rate at step 0.
        end: drop rate at step `steps` and after it.
        steps: length of the ramp, at least 1.

    Raises:
        TypeError: a rate is not a number, or `steps` not an int.
        ValueError: a rate is outside [0, 1) or `steps` below 1.

    Examples:
        >>> [round(cosine(0.0, 0.8, steps=4)(step), 3) for step in range(6)]
        [0.0, 0.117, 0.4, 0.683, 0.8, 0.8]
    """
    return CosineSchedule(start, end, steps)


@dataclass(frozen=True)
class _Ramp(Schedule):
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        check_rate("start", self.start)
        check_rate("end", self.end)
        check_steps("steps", self.steps, 1)

    @property
    def highest(self) -> float:
        """The highest drop rate over all steps."""
        return max(self.start, self.end)

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that occur."""
        return _level(self.start) if self.start == self.end else None


@dataclass(frozen=True)
class LinearSchedule(_Ramp):
    """What `linear` returns."""

    __repr__ = as_call("linear")

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        return self.start + (self.end - self.start) * min(step, self.steps) / self.steps


@dataclass(frozen=True)
class CosineSchedule(_Ramp):
    """What `cosine` returns."""

    __repr__ = as_call("cosine")

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        if step == 0:
            return float(self.start)
        if step >= self.steps:
            return float(self.end)
        wave = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.end + (self.start - self.end) * wave


def bar(rate: float, period: int, dense_fraction: float = 0.5) -> Schedule:
    """Alternate dense steps and steps at `rate`, as ssProp recommends (arXiv 2408.12561).

    Steps whose position in the period is below `dense_fraction * period` have drop rate 0, the
    rest have `rate`.

    Args:
        rate: drop rate of the sparse part.
        period: steps in one dense and one sparse part together, at least 1.
        dense_fraction: share of the period that is dense, in [0, 1].

    Raises:
        TypeError: a rate or fraction is not a number, or `period` not an int.
        ValueError: `rate` is outside [0, 1), `period` below 1, or `dense_fraction` outside [0, 1].

    Examples:
        >>> [bar(0.8, period=4)(step) for step in range(6)]
        [0.0, 0.0, 0.8, 0.8, 0.0, 0.0]
    """
    return BarSchedule(rate, period, dense_fraction)


@dataclass(frozen=True)
class BarSchedule(Schedule):
    """What `bar` returns."""

    rate: float
    period: int
    dense_fraction: float

    __repr__ = as_call("bar")

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)
        check_steps("period", self.period, 1)
        fraction = self.dense_fraction
        if not isinstance(fraction, (int, float)) or isinstance(fraction, bool):
            raise TypeError(f"dense_fraction must be a number, got {fraction!r}")
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"dense_fraction must be in [0, 1], got {fraction!r}")

    def __call__(self, step: int) -> float:
        """Return the drop rate of `step`."""
        # Rounded, because 0.28 * 25 is a little more than 7 in floating point.
        dense_steps = math.ceil(round(self.dense_fraction * self.period, 9))
        return 0.0 if step % self.period < dense_steps else float(self.rate)

    @property
    def highest(self) -> float:
        """The highest drop rate over all steps."""
        return float(self.rate)

    @property
    def levels(self) -> frozenset[float]:
        """All drop rates above 0 that occur."""
        return _level(self.rate)


def _level(rate: float) -> frozenset[float]:
    return frozenset({float(rate)} if rate else ())


# The schedules that `parse_schedule` knows, with example settings. Settings are the function's
# parameters; int parameters are lengths in steps.
IN_TEXT: dict[Callable[..., Schedule], str] = {
    constant: "rate=0.5",
    linear: "start=0,end=0.8,steps=10ep",
    cosine: "start=0,end=0.8,steps=10ep",
    bar: "rate=0.8,period=2ep",
}
