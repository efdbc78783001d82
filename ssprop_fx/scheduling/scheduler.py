"""SparsityScheduler: the only holder of mutable state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal

import torch

from ssprop_fx.scheduling.controller_state import ControllerState
from ssprop_fx.scheduling.controllers import Controller
from ssprop_fx.scheduling.keep_counts import KeepCounts
from ssprop_fx.scheduling.sample_rules import SampleRule
from ssprop_fx.scheduling.schedules import constant
from ssprop_fx.scheduling.telemetry import SiteTelemetry

__all__ = ["SparsityScheduler"]


class SparsityScheduler:
    """Sets the drop rate of every model compiled with it, much like an LR scheduler.

    The step in force begins at 0. Call `step()` after each optimizer step (or once an epoch, if
    the schedule counts epochs).

    Args:
        schedule: step -> drop rate in [0, 1), such as `bar(0.8, period=2 * len(loader))`. With a
            controller it may be left out: then every step is sparse.
        controller: decides how much is kept, when the schedule's drop rate is above 0. With
            `axis="sample"`, `KeptMass(0.9)` or `AddedNoise(0.1)` decides in each step how many
            samples are kept; the schedule says only which steps are sparse. With `axis="channel"`,
            `KeptMass(0.9)` or `AddedError(0.1)` sets the drop rate of each layer from its
            telemetry, except where `SparsityConfig.rates` gives one. Until its first decision the
            schedule's drop rate holds. Under DistributedDataParallel each process decides for
            itself.

    Raises:
        TypeError: `schedule` is not callable, or `controller` is not a controller.
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
        self,
        schedule: Callable[[int], float] | None = None,
        controller: Controller | SampleRule | None = None,
    ) -> None:
        if schedule is None and controller is not None:
            schedule = constant(0.5)
        if not callable(schedule):
            is_rule = isinstance(schedule, (Controller, SampleRule))
            hint = (
                f": write controller={schedule!r}" if is_rule else ", unless there is a controller"
            )
            raise TypeError(
                f"schedule must be a schedule such as constant(0.8), got {schedule!r}{hint}"
            )
        if controller is not None and not isinstance(controller, (Controller, SampleRule)):
            raise TypeError(
                f"controller must be a controller such as KeptMass(0.9), got {controller!r}"
            )
        self.schedule = schedule
        self.controller = controller
        self._is_dense = False
        self._loaded: list[dict[str, Any]] = []
        self._keep_counts = torch.zeros(0, dtype=torch.int64)
        self._models: list[tuple[KeepCounts, ControllerState | None]] = []
        self._set_step(0)

    @property
    def last_step(self) -> int:
        """The step in force, from 0."""
        return self._last_step

    @property
    def drop_rate(self) -> float:
        """The drop rate of the step in force."""
        return 0.0 if self._is_dense else self._drop_rate

    @property
    def highest_drop_rate(self) -> float:
        """The schedule's highest drop rate; at least 0.8 if the schedule does not state it."""
        return max(self._drop_rate, getattr(self.schedule, "highest", 0.8))

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that occur; None if there are many or a controller sets them."""
        if self.controller is not None:
            return None
        return getattr(self.schedule, "levels", None)

    @property
    def keep_counts(self) -> torch.Tensor:
        """The runtime sparsity tensor: int64, CPU, one entry a slot, in order of registration."""
        return self._keep_counts

    def step(self) -> None:
        """Advance by one step."""
        for counts, control in self._models:
            counts.telemetry.poll()
            if control is not None:
                control.end_step()
        self._set_step(self._last_step + 1)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Make the steps inside the `with` block dense, forward and backward.

        For gradients that must be exact although the model trains, such as those of the input for
        an adversarial example or a saliency map.

        Examples:
            >>> from ssprop_fx import constant
            >>> scheduler = SparsityScheduler(constant(0.8))
            >>> with scheduler.dense():
            ...     scheduler.drop_rate
            0.0
            >>> scheduler.drop_rate
            0.8
        """
        before, self._is_dense = self._is_dense, True
        self.refresh()
        try:
            yield
        finally:
            self._is_dense = before
            self.refresh()

    def telemetry(self) -> dict[str, SiteTelemetry]:
        """Return the latest telemetry of sparse backwards, by layer name, without waiting.

        It covers models compiled with `SparsityConfig(telemetry=True)`. On a CPU the values come
        from the last backward; on a GPU they are some steps older. If a step calls a layer several
        times or runs several micro-batches, the last backward counts. Layers whose gradient was
        not finite are missing. If several models have layers of the same name, the model compiled
        last counts; `model.ssprop.telemetry()` covers one model.

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
            for counts, _ in self._models
            for name, site in counts.telemetry.latest().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values, without the schedule and the controller themselves."""
        state: dict[str, Any] = {"last_step": self._last_step}
        if self.controller is not None:
            state["control"] = [c.state_dict() for _, c in self._models if c is not None]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that `state_dict()` returned.

        Args:
            state_dict: the state.

        Raises:
            ValueError: `state_dict` is not the state of a SparsityScheduler.
        """
        last_step = state_dict.get("last_step") if isinstance(state_dict, dict) else None
        if not isinstance(last_step, int) or isinstance(last_step, bool) or last_step < 0:
            raise ValueError(
                "state_dict must come from SparsityScheduler.state_dict() and hold last_step >= 0,"
                f" got {state_dict!r}"
            )
        # A model that is compiled later loads its state then.
        self._loaded = list(state_dict.get("control", ()))
        for number, (_, control) in enumerate(self._models):
            self._load_control(number, control)
        self._set_step(last_step)

    def register(
        self,
        channels: Sequence[int],
        multiple: int | Literal["auto"],
        groups: Sequence[int] | None = None,
        rates: Sequence[float | None] | None = None,
        block: int = 1,
        names: Sequence[str] | None = None,
        batch: bool = False,
    ) -> KeepCounts:
        """Add a model's slots to the runtime sparsity tensor. `ssprop_compile` calls this.

        Args:
            channels: output channels of each slot.
            multiple: keep counts are rounded to multiples of this.
            groups: number of groups in which each slot selects channels; one by default.
            rates: drop rate of each slot that has its own, None for the others.
            block: keep counts are multiples of this.
            names: layer name of each slot; slot numbers by default.
            batch: whether the last slot counts the kept samples of the batch.

        Returns:
            The model's part of the tensor.

        Raises:
            ValueError: the controller is not one of samples, or not one of channels.
        """
        rule, control = self.controller if batch else None, None if batch else self.controller
        if rule is not None and not isinstance(rule, SampleRule):
            raise ValueError(
                'controller must be KeptMass or AddedNoise with SparsityConfig(axis="sample"), got'
                f" {rule!r}"
            )
        if control is not None and not isinstance(control, Controller):
            raise ValueError(
                f"controller must be KeptMass or AddedError for channels, got {control!r}: with"
                ' SparsityConfig(axis="sample") it chooses samples'
            )
        start = self._keep_counts.numel()
        # In place, so that every holder of the tensor or of a part of it still sees the counts.
        self._keep_counts.resize_(start + len(channels))
        groups, rates = groups or [1] * len(channels), rates or [None] * len(channels)
        names = names or [str(number) for number in range(len(channels))]
        counts = KeepCounts(
            self, start, channels, multiple, groups, rates, block, names, batch, rule
        )
        state = None if control is None else ControllerState(control, counts)
        self._load_control(len(self._models), state)
        self._models.append((counts, state))
        self.refresh()
        return counts

    def refresh(self) -> None:
        """Write the keep counts at the drop rate in force into the runtime sparsity tensor."""
        values = [
            k
            for counts, control in self._models
            for k in counts.at(self.drop_rate, None if control is None else control.rates)
        ]
        self._keep_counts.copy_(torch.tensor(values, dtype=torch.int64))

    def _load_control(self, number: int, control: ControllerState | None) -> None:
        if control is not None and number < len(self._loaded):
            control.load_state_dict(self._loaded[number])

    def _set_step(self, step: int) -> None:
        rate: Any = self.schedule(step)
        if not isinstance(rate, Real) or not 0.0 <= float(rate) < 1.0:
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
