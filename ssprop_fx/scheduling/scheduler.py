"""SparsityScheduler: the only holder of mutable state."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ssprop_fx.compiler.slots import keep_count
from ssprop_fx.scheduling.controller_state import Control
from ssprop_fx.scheduling.controllers import Controller
from ssprop_fx.scheduling.telemetry import SiteTelemetry, Telemetry

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
        multiple: keep counts are rounded to multiples of this; see `keep_count`.
        names: name of the layer of each slot.
        telemetry: what the model's sparse backwards tell.
        control: what the scheduler's controller makes of that, None without one.
    """

    def __init__(
        self,
        scheduler: "SparsityScheduler",
        start: int,
        channels: Sequence[int],
        multiple: int | Literal["auto"],
        groups: Sequence[int],
        rates: Sequence[float | None],
        block: int,
        names: Sequence[str],
    ) -> None:
        self._scheduler = scheduler
        self._start = start
        self.channels = tuple(channels)
        self.multiple = multiple
        self.groups = tuple(groups)
        self.rates = tuple(rates)
        self.block = block
        self.names = tuple(names)
        self.telemetry = Telemetry()
        controller = scheduler.controller
        self.control = None if controller is None else Control(controller, self)

    def follow_batch(self, size: int) -> None:
        """Count samples of a batch of this size, in every slot, in place of channels."""
        if any(channels != size for channels in self.channels):
            self.channels = (size,) * len(self.channels)
            self._scheduler.refresh()

    def at(self, drop_rate: float) -> list[int]:
        """Return the keep count of each slot at a drop rate of the schedule, none controlled."""
        return [
            self._keep_count(slot, drop_rate if rate is None or drop_rate == 0 else rate)
            for slot, rate in enumerate(self.rates)
        ]

    def in_force(self) -> list[int]:
        """Return the keep count of each slot at the step in force."""
        counts = self.at(self._scheduler.drop_rate)
        if self.control is not None and self._scheduler.drop_rate > 0:
            for slot, name in enumerate(self.names):
                if name in self.control.rates:
                    counts[slot] = self._keep_count(slot, self.control.rates[name])
        return counts

    def shares(self) -> dict[str, float]:
        """Return the share of each layer's channels that is kept now, by name."""
        kept = zip(self.names, self.tensor.tolist(), self.groups, self.channels, strict=True)
        return {name: count * groups / channels for name, count, groups, channels in kept}

    def rounding(self, name: str) -> Callable[[float], float]:
        """Return a function from a drop rate to the share of a layer's channels kept at it."""
        slot = self.names.index(name)
        whole = self.channels[slot] // self.groups[slot]
        return lambda drop_rate: self._keep_count(slot, drop_rate) / whole

    @property
    def adjustable(self) -> list[str]:
        """Names of the layers whose drop rate is not their own."""
        return [n for n, rate in zip(self.names, self.rates, strict=True) if rate is None]

    def _keep_count(self, slot: int, drop_rate: float) -> int:
        channels, groups = self.channels[slot], self.groups[slot]
        return keep_count(channels, drop_rate, self.multiple, groups, self.block)

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
        controller: sets the drop rate of each layer from what its backwards tell, such as
            `KeptMass(0.9)`, wherever the schedule's is above 0 and `SparsityConfig.rates` gives the
            layer none. Until its first decision the schedule's drop rate holds. Under
            DistributedDataParallel each process decides for itself.

    Raises:
        TypeError: `schedule` is not callable, or `controller` is no controller.
        ValueError: `schedule` returns a drop rate outside [0, 1).

    Examples:
        >>> from ssprop_fx import bar
        >>> scheduler = SparsityScheduler(bar(0.8, period=2))
        >>> scheduler.drop_rate
        0.0
        >>> scheduler.step()
        >>> scheduler.last_step, scheduler.drop_rate
        (1, 0.8)
    """

    def __init__(
        self, schedule: Callable[[int], float], controller: Controller | None = None
    ) -> None:
        if not callable(schedule):
            raise TypeError(f"schedule must be a schedule such as constant(0.8), got {schedule!r}")
        if controller is not None and not isinstance(controller, Controller):
            raise TypeError(
                f"controller must be a controller such as KeptMass(0.9), got {controller!r}"
            )
        self.schedule = schedule
        self.controller = controller
        self._loaded: list[dict[str, Any]] = []
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
        """All drop rates above 0 that the schedule visits, None where they are many.

        Or where a controller sets others.
        """
        if self.controller is not None:
            return None
        return getattr(self.schedule, "levels", None)

    @property
    def keep_counts(self) -> torch.Tensor:
        """The runtime sparsity tensor: int64, CPU, one entry a slot, in order of registration."""
        return self._keep_counts

    def step(self) -> None:
        """Advance by one step."""
        for counts in self._registered:
            counts.telemetry.poll()
            if counts.control is not None:
                counts.control.end_step()
        self._set_step(self._last_step + 1)

    def telemetry(self) -> dict[str, SiteTelemetry]:
        """Return the last values that the sparse backwards have left behind, by name of the layer.

        Those of models compiled with `SparsityConfig(telemetry=True)`; nothing waits for them. On
        a CPU they are those of the last backward, on a GPU some steps older. A layer that a step
        calls several times tells of the last of its backwards, several micro-batches of the last
        one. Layers whose gradient was not finite are missing. Where models have layers of the same
        name, those of the model compiled last count; `model.ssprop.telemetry()` tells of one.

        Examples:
            >>> from ssprop_fx import SparsityConfig, constant, ssprop_compile
            >>> scheduler = SparsityScheduler(constant(0.5))
            >>> config = SparsityConfig(telemetry=True)
            >>> layer = torch.nn.Sequential(torch.nn.Linear(8, 64))
            >>> model = ssprop_compile(layer, scheduler, config=config, backend="aot_eager")
            >>> model(torch.randn(4, 8)).square().sum().backward()
            >>> 0.5 < scheduler.telemetry()["0"].kept_mass < 1
            True
        """
        return {
            name: site
            for counts in self._registered
            for name, site in counts.telemetry.latest().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values; schedule and controller themselves are not in it."""
        state: dict[str, Any] = {"last_step": self._last_step}
        if self.controller is not None:
            state["control"] = [c.control.state_dict() for c in self._registered if c.control]
        return state

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
        # Models that are compiled later find theirs when they are.
        self._loaded = list(state_dict.get("control", ()))
        for number, counts in enumerate(self._registered):
            self._load_control(number, counts)
        self._set_step(last_step)

    def register(
        self,
        channels: Sequence[int],
        multiple: int | Literal["auto"],
        groups: Sequence[int] | None = None,
        rates: Sequence[float | None] | None = None,
        block: int = 1,
        names: Sequence[str] | None = None,
    ) -> KeepCounts:
        """Add a model's slots to the runtime sparsity tensor. `ssprop_compile` calls this.

        Args:
            channels: output channels of each slot.
            multiple: keep counts are rounded to multiples of this.
            groups: number of groups that each slot selects channels in; one by default.
            rates: drop rate of each slot that does not follow the schedule's, None for the others.
            block: keep counts are multiples of this.
            names: name of the layer of each slot; the slots' numbers by default.

        Returns:
            The model's part of the tensor.
        """
        start = self._keep_counts.numel()
        # In place, so that whoever holds the tensor or a part of it goes on seeing the counts.
        self._keep_counts.resize_(start + len(channels))
        groups, rates = groups or [1] * len(channels), rates or [None] * len(channels)
        names = names or [str(number) for number in range(len(channels))]
        counts = KeepCounts(self, start, channels, multiple, groups, rates, block, names)
        self._load_control(len(self._registered), counts)
        self._registered.append(counts)
        self.refresh()
        return counts

    def refresh(self) -> None:
        """Write the keep counts of the drop rate in force into the runtime sparsity tensor."""
        values = [k for counts in self._registered for k in counts.in_force()]
        self._keep_counts.copy_(torch.tensor(values, dtype=torch.int64))

    def _load_control(self, number: int, counts: KeepCounts) -> None:
        if counts.control is not None and number < len(self._loaded):
            counts.control.load_state_dict(self._loaded[number])

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
