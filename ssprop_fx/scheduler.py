"""SparsityScheduler: the only holder of mutable state."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssprop_fx.slots import keep_count

__all__ = ["KeepCounts", "SparsityScheduler"]


class KeepCounts:
    """One model's part of a scheduler's runtime sparsity tensor.

    Made by `SparsityScheduler.register`.

    Attributes:
        channels: output channels of each of the model's slots; where samples are chosen, those
            of the batch, and 1 before the first sparse step.
        groups: number of groups that each selects them in.
        rates: drop rate of each where it has one of its own, else None.
        block: keep counts are multiples of this.
        multiple: keep counts are rounded to multiples of this; assign and call
            `SparsityScheduler.refresh` to change it.
    """

    def __init__(
        self,
        scheduler: "SparsityScheduler",
        start: int,
        channels: Sequence[int],
        multiple: int,
        groups: Sequence[int],
        rates: Sequence[float | None],
        block: int,
    ) -> None:
        self._scheduler = scheduler
        self._start = start
        self.channels = tuple(channels)
        self.multiple = multiple
        self.groups = tuple(groups)
        self.rates = tuple(rates)
        self.block = block

    def follow_batch(self, size: int) -> None:
        """Count samples of a batch of this size, in every slot, in place of channels."""
        if any(channels != size for channels in self.channels):
            self.channels = (size,) * len(self.channels)
            self._scheduler.refresh()

    def at(self, drop_rate: float) -> list[int]:
        """Return the keep count of each slot at a drop rate of the schedule."""
        slots = zip(self.channels, self.groups, self.rates, strict=True)
        return [
            keep_count(
                channels,
                drop_rate if rate is None or drop_rate == 0 else rate,
                self.multiple,
                groups,
                self.block,
            )
            for channels, groups, rate in slots
        ]

    @property
    def smallest(self) -> list[int]:
        """The keep count of each slot at the schedule's highest drop rate."""
        return self.at(self._scheduler.highest_drop_rate)

    @property
    def levels(self) -> frozenset[tuple[int, ...]] | None:
        """The keep counts of each slot at each drop rate of the schedule, None if too many."""
        rates = self._scheduler.levels
        return None if rates is None else frozenset(tuple(self.at(rate)) for rate in rates)

    @property
    def tensor(self) -> torch.Tensor:
        """The live keep counts: int64, CPU, shape [slots of the model]."""
        return self._scheduler.keep_counts[self._start : self._start + len(self.channels)]


class SparsityScheduler:
    """Moves the drop rate of every model compiled with it, in the manner of an LR scheduler.

    The step in force begins at 0; call `step()` after each optimizer step (or once an epoch, if
    the schedule counts epochs).

    Args:
        schedule: step -> drop rate in [0, 1), such as `bar(0.8, period=2 * len(loader))`.

    Raises:
        TypeError: `schedule` is not callable.
        ValueError: `schedule` returns a drop rate outside [0, 1).

    Example:
        >>> from ssprop_fx import bar
        >>> scheduler = SparsityScheduler(bar(0.8, period=2))
        >>> scheduler.drop_rate
        0.0
        >>> scheduler.step()
        >>> scheduler.last_step, scheduler.drop_rate
        (1, 0.8)
    """

    def __init__(self, schedule: Callable[[int], float]) -> None:
        if not callable(schedule):
            raise TypeError(f"schedule must be a schedule such as constant(0.8), got {schedule!r}")
        self.schedule = schedule
        self._keep_counts = torch.zeros(0, dtype=torch.int64)
        self._registered: list[KeepCounts] = []
        self._set_step(0)

    @property
    def last_step(self) -> int:
        """The step in force, from 0."""
        return self._last_step

    @property
    def drop_rate(self) -> float:
        """The drop rate of the step in force."""
        return self._drop_rate

    @property
    def highest_drop_rate(self) -> float:
        """The schedule's highest drop rate; at least 0.8 where the schedule cannot tell."""
        return max(self._drop_rate, getattr(self.schedule, "highest", 0.8))

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that the schedule visits, None where they are many."""
        return getattr(self.schedule, "levels", None)

    @property
    def keep_counts(self) -> torch.Tensor:
        """The runtime sparsity tensor: int64, CPU, one entry a slot, in order of registration."""
        return self._keep_counts

    def step(self) -> None:
        """Advance by one step."""
        self._set_step(self._last_step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of plain values; the schedule itself is not in it."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that `state_dict()` returned.

        Args:
            state_dict: the state.

        Raises:
            ValueError: it is not a state of a SparsityScheduler.
        """
        last_step = state_dict.get("last_step") if isinstance(state_dict, dict) else None
        if not isinstance(last_step, int) or isinstance(last_step, bool) or last_step < 0:
            raise ValueError(
                "state_dict must come from SparsityScheduler.state_dict() and hold last_step >= 0,"
                f" got {state_dict!r}"
            )
        self._set_step(last_step)

    def register(
        self,
        channels: Sequence[int],
        multiple: int,
        groups: Sequence[int] | None = None,
        rates: Sequence[float | None] | None = None,
        block: int = 1,
    ) -> KeepCounts:
        """Add a model's slots to the runtime sparsity tensor. `ssprop_compile` calls this.

        Args:
            channels: output channels of each slot.
            multiple: keep counts are rounded to multiples of this.
            groups: number of groups that each slot selects channels in; one by default.
            rates: drop rate of each slot that does not follow the schedule's, None for the others.
            block: keep counts are multiples of this.

        Returns:
            The model's part of the tensor.
        """
        start = self._keep_counts.numel()
        # In place, so that whoever holds the tensor or a part of it goes on seeing the counts.
        self._keep_counts.resize_(start + len(channels))
        groups, rates = groups or [1] * len(channels), rates or [None] * len(channels)
        counts = KeepCounts(self, start, channels, multiple, groups, rates, block)
        self._registered.append(counts)
        self.refresh()
        return counts

    def refresh(self) -> None:
        """Write the keep counts of the drop rate in force into the runtime sparsity tensor."""
        values = [k for counts in self._registered for k in counts.at(self._drop_rate)]
        self._keep_counts.copy_(torch.tensor(values, dtype=torch.int64))

    def _set_step(self, step: int) -> None:
        rate = self.schedule(step)
        if not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
            raise ValueError(
                f"schedule must return a drop rate in [0, 1), got {rate!r} at step {step}"
            )
        self._last_step = step
        self._drop_rate = float(rate)
        self.refresh()

    def __repr__(self) -> str:
        return (
            f"SparsityScheduler(schedule={self.schedule!r}, last_step={self._last_step},"
            f" drop_rate={self._drop_rate})"
        )
