"""ControllerState: what a controller has seen of one model, and what it decided."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ssprop_fx.scheduling.controllers import LAG, Controller, Seen
from ssprop_fx.scheduling.keep_counts import KeepCounts
from ssprop_fx.scheduling.telemetry import SiteTelemetry, Snapshot

__all__ = ["ControllerState"]


class ControllerState:
    """The telemetry that a controller last received for a model, and what it decided.

    The copy of a step's telemetry starts after the step and is always read `LAG` sparse steps
    later, so decisions do not depend on when a GPU finishes.

    Args:
        controller: makes the decisions.
        counts: the model's keep counts.

    Attributes:
        rates: drop rate of each layer that the controller has decided on, by name.
    """

    def __init__(self, controller: Controller, counts: KeepCounts) -> None:
        self.controller = controller
        self.rates: dict[str, float] = {}
        self._counts = counts
        self._steps = 0
        self._last_run = 0
        self._kept: dict[str, float] = {}
        self._told: Snapshot | dict[str, SiteTelemetry] = {}

    def end_step(self) -> None:
        """Record the end of a step, and decide when a decision is due. Dense steps do not count."""
        last_run = self._counts.telemetry.last_run
        if last_run == self._last_run:
            return
        self._last_run = last_run
        self._steps += 1
        if (self._steps + LAG) % self.controller.every == 0:
            self._kept = self._counts.shares()
            self._told = self._counts.telemetry.snapshot()
        elif self._steps % self.controller.every == 0:
            self._decide()

    def _decide(self) -> None:
        told, kept_now = self._read(), self._counts.shares()
        flops, total = self._counts.telemetry.flops()
        layers = {
            name: Seen(
                kept=self._kept[name],
                aimed=1 - self.rates[name] if name in self.rates else self._kept[name],
                telemetry=told[name],
                flops=flops[name] / total,
                kept_at=self._counts.rounding(name),
            )
            for name in self._counts.adjustable
            if name in told and name in self._kept and name in flops
        }
        if layers:
            others = sum(f * kept_now[name] for name, f in flops.items() if name not in layers)
            rest = 1 - (sum(flops.values()) - others) / total
            self.rates.update(self.controller.decide(layers, rest))

    def _read(self) -> dict[str, SiteTelemetry]:
        return self._told.values() if isinstance(self._told, Snapshot) else self._told

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values; waits for telemetry that is still being copied."""
        return {
            "rates": dict(self.rates),
            "steps": self._steps,
            "kept": dict(self._kept),
            "told": {name: asdict(site) for name, site in self._read().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict()` returned."""
        self.rates = dict(state["rates"])
        self._steps = state["steps"]
        self._kept = dict(state["kept"])
        self._told = {name: SiteTelemetry(**site) for name, site in state["told"].items()}
