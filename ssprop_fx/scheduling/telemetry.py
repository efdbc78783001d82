"""Telemetry: the numbers that compiled backwards leave behind, read without waiting for them."""

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
    """A compiled graph as called for one group of layers; it registers itself when it runs.

    Attributes:
        table: what its backward reports, float32 [slots, 3]; None without telemetry.
        rows: the row of each layer, by name.
        last_run: number of the last call, among all calls of all graphs.
    """

    @property
    def table(self) -> Tensor | None: ...  # noqa: D102

    @property
    def rows(self) -> Mapping[str, int]: ...  # noqa: D102

    @property
    def last_run(self) -> int: ...  # noqa: D102

    @property
    def sparse_flops(self) -> tuple[tuple[str, int], ...]:
        """Layer and FLOPs, at full size, of the sparse gradients of each site."""

    @property
    def total_flops(self) -> int:
        """FLOPs of all backward convolutions and matrix products, were they dense."""


@dataclass(frozen=True)
class SiteTelemetry:
    """What one sparse backward of a layer tells, of the gradient of its output.

    Attributes:
        kept_mass: share of the score, which is |gradient| for `"mean_abs"`, that the kept channels
            hold.
        error: squared norm of what is left out, or added by weights, as a share of the gradient's.
            For an unbiased selector its mean over steps is the relative variance added.
        grad_norm: l2 norm of the gradient before anything is left out, with whatever factor a
            gradient scaler puts on the loss.
    """

    kept_mass: float
    error: float
    grad_norm: float


class Snapshot:
    """A model's telemetry of one moment, which may still be on its way from a GPU.

    Args:
        tables: float32 [slots, 3] each, with the row of each layer in it, by name.
    """

    def __init__(self, tables: list[tuple[Tensor, Mapping[str, int]]]) -> None:
        self._tables = [(_copy(table), rows) for table, rows in tables]
        devices = {table.device for table, _ in tables if table.is_cuda}
        self._events = [torch.cuda.current_stream(device).record_event() for device in devices]

    @property
    def is_done(self) -> bool:
        """Whether the values are here."""
        return all(event.query() for event in self._events)

    def values(self) -> dict[str, SiteTelemetry]:
        """Return the values by name of the layer, waiting for them if they are not here.

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

    On a CPU the values are those of the last backward. On a GPU a copy to the host is under way
    most of the time, and the values are those of the last one that has arrived, one or a few steps
    old.
    """

    def __init__(self) -> None:
        self._calls: weakref.WeakSet[GraphCall] = weakref.WeakSet()
        self._pending: Snapshot | None = None
        self._latest: dict[str, SiteTelemetry] = {}

    def register(self, call: GraphCall) -> None:
        """Read the table of a graph that runs, too, for as long as the graph lives."""
        self._calls.add(call)

    def snapshot(self) -> Snapshot:
        """Begin to copy the values that the backwards started so far are going to leave."""
        return Snapshot(self._tables())

    def poll(self) -> None:
        """Take what has arrived from a GPU, and send for more. Once a step."""
        if self._pending is not None and self._pending.is_done:
            self._latest = self._pending.values()
            self._pending = None
        if self._pending is None and any(table.is_cuda for table, _ in self._tables()):
            self._pending = self.snapshot()

    def latest(self) -> dict[str, SiteTelemetry]:
        """Return the last values that are here, by name of the layer."""
        tables = self._tables()
        if any(table.is_cuda for table, _ in tables):
            return dict(self._latest)
        return Snapshot(tables).values()

    @property
    def last_run(self) -> int:
        """Number of the last call of a sparse graph, among those of all models; 0 before."""
        return max((call.last_run for call in self._calls), default=0)

    def flops(self) -> tuple[dict[str, int], int]:
        """Return the FLOPs of each layer's sparse gradients at full size, and of all the backward.

        The latter are those of the convolutions and matrix products, were they dense, of the graphs
        called last, for one batch.
        """
        # Of the graphs for one group of layers the last one that ran.
        graphs = {tuple(name for name, _ in c.sparse_flops): c for c in self._in_order()}
        of_layers: Counter[str] = Counter()
        for call in graphs.values():
            for name, flops in call.sparse_flops:
                of_layers[name] += flops
        of_layers = +of_layers
        return dict(of_layers), sum(call.total_flops for call in graphs.values())

    def _in_order(self) -> list[GraphCall]:
        """Return what has run, the last run last."""
        return sorted(self._calls, key=lambda call: call.last_run)

    def _tables(self) -> list[tuple[Tensor, Mapping[str, int]]]:
        return [(call.table, call.rows) for call in self._in_order() if call.table is not None]

    def __reduce__(self) -> tuple[Any, ...]:
        # What compiled graphs leave behind does not travel with a copy.
        return Telemetry, ()


def empty_table(slots: int, device: torch.device) -> Tensor:
    """Return a table that no backward has written yet."""
    return torch.full((slots, len(FIELDS)), math.nan, device=device)


def _copy(table: Tensor) -> Tensor:
    if not table.is_cuda:
        return table.clone()
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    return host.copy_(table, non_blocking=True)
