"""Telemetry: numbers that compiled backwards record, read without waiting for a GPU."""

import math
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from ssprop_passes.selection.observe import FIELDS
from torch import Tensor

__all__ = ["GraphCall", "SiteTelemetry", "Snapshot", "Telemetry", "empty_table"]


class GraphCall(Protocol):
    """A compiled graph, called for one group of layers; it is registered when it runs.

    Attributes:
        table: what its backward reports, float32 [slots, 3]; None without telemetry.
        rows: the row of each layer, by name.
        last_run: number of its last call; calls of all graphs are numbered together.
    """

    @property
    def table(self) -> Tensor | None: ...  # noqa: D102

    @property
    def rows(self) -> Mapping[str, int]: ...  # noqa: D102

    @property
    def last_run(self) -> int: ...  # noqa: D102

    @property
    def sparse_flops(self) -> tuple[tuple[str, int], ...]:
        """For each site its layer, and the FLOPs of its sparse gradients at full size."""

    @property
    def total_flops(self) -> int:
        """FLOPs of all backward convolutions and matrix products if they were dense."""


@dataclass(frozen=True)
class SiteTelemetry:
    """What one sparse backward of a layer reports about the gradient of the layer's output.

    Attributes:
        kept_mass: share of the total score that the kept channels hold. For `"mean_abs"` the score
            is |gradient|.
        error: squared norm of what is left out or added by weights, as a share of the gradient's
            squared norm. For an unbiased selector its mean over steps is the relative added
            variance.
        grad_norm: l2 norm of the full gradient, including the factor of a gradient scaler.
    """

    kept_mass: float
    error: float
    grad_norm: float


class Snapshot:
    """A model's telemetry at one moment; its copy from a GPU may still be running.

    Args:
        tables: pairs of a table, float32 [slots, 3], and the row of each layer in it, by name.
    """

    def __init__(self, tables: list[tuple[Tensor, Mapping[str, int]]]) -> None:
        self._tables = [(_copy(table), rows) for table, rows in tables]
        devices = {table.device for table, _ in tables if table.is_cuda}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]

    @property
    def is_done(self) -> bool:
        """Whether the values have arrived."""
        return all(event.query() for event in self._events)

    def values(self) -> dict[str, SiteTelemetry]:
        """Return the values by layer name; wait for them if they have not arrived.

        Layers whose gradient was not finite, or that no backward has reached yet, are missing.
        """
        for event in self._events:
            event.synchronize()
        found: dict[str, SiteTelemetry] = {}
        for table, rows in self._tables:
            numbers = table.tolist()
            found.update({name: SiteTelemetry(*numbers[row]) for name, row in rows.items()})
        return {name: site for name, site in found.items() if not math.isnan(site.kept_mass)}

    def __getstate__(self) -> dict[str, Any]:
        for event in self._events:
            event.synchronize()
        return {"_tables": self._tables, "_events": []}


class Telemetry:
    """The telemetry of a model and its copies.

    On a CPU the values come from the last backward. On a GPU they come from the last copy that has
    arrived on the host, one or a few steps old.
    """

    def __init__(self) -> None:
        self._calls: weakref.WeakSet[GraphCall] = weakref.WeakSet()
        self._pending: Snapshot | None = None
        self._latest: dict[str, SiteTelemetry] = {}

    def register(self, call: GraphCall) -> None:
        """Read the table of this graph from now on, as long as the graph lives."""
        self._calls.add(call)

    def snapshot(self) -> Snapshot:
        """Start a copy of the values that all backwards started so far will record."""
        return Snapshot(self._tables())

    def poll(self) -> None:
        """Take the values that have arrived from a GPU, and start the next copy. Once a step."""
        if self._pending is not None and self._pending.is_done:
            self._latest = self._pending.values()
            self._pending = None
        if self._pending is None and any(table.is_cuda for table, _ in self._tables()):
            self._pending = self.snapshot()

    def latest(self) -> dict[str, SiteTelemetry]:
        """Return the latest values that have arrived, by layer name."""
        tables = self._tables()
        if any(table.is_cuda for table, _ in tables):
            return dict(self._latest)
        return Snapshot(tables).values()

    @property
    def last_run(self) -> int:
        """Number of the last call of a sparse graph; all models count together. 0 before any."""
        return max((call.last_run for call in self._calls), default=0)

    def flops(self) -> tuple[dict[str, int], int]:
        """Return FLOPs for one batch: of each layer's sparse gradients at full size, and in total.

        The total counts all backward convolutions and matrix products of the graphs that ran last,
        as if they were dense.
        """
        # For each group of layers, take the graph that ran last.
        graphs = {tuple(name for name, _ in c.sparse_flops): c for c in self._in_order()}
        of_layers: Counter[str] = Counter()
        for call in graphs.values():
            for name, flops in call.sparse_flops:
                of_layers[name] += flops
        of_layers = +of_layers
        return dict(of_layers), sum(call.total_flops for call in graphs.values())

    def _in_order(self) -> list[GraphCall]:
        """Return the graphs that have run, in the order of their last runs."""
        return sorted(self._calls, key=lambda call: call.last_run)

    def _tables(self) -> list[tuple[Tensor, Mapping[str, int]]]:
        return [(call.table, call.rows) for call in self._in_order() if call.table is not None]

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy does not take the values of compiled graphs along.
        return Telemetry, ()


def empty_table(slots: int, device: torch.device) -> Tensor:
    """Return a table that no backward has written yet."""
    return torch.full((slots, len(FIELDS)), math.nan, device=device)


def _copy(table: Tensor) -> Tensor:
    if not table.is_cuda:
        return table.clone()
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    return host.copy_(table, non_blocking=True)
