"""Instances: one compiled graph, called for different groups of layers.

Dynamo compiles a module's code once for all modules with the same shapes, and takes their
parameters as inputs. If a model repeats a block with a graph break, the graph compiled for the
first block serves the other blocks, each with its own keep counts. Under one backend, the graph
compiled for one model also serves other models of the same kind.
"""

import copy
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.graph.modes import outside_modes
from ssprop_passes.graph.state_inputs import StateInputs
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.site import Site
from torch import Tensor, nn

from ssprop_fx.compiler.backward_state import Memory, MemoryInput
from ssprop_fx.compiler.batch_input import BatchInput
from ssprop_fx.compiler.sample_choice import SampleChoice, current_choice_maybe
from ssprop_fx.compiler.site_cache import GraphRecord
from ssprop_fx.compiler.slots import SlotTable, weight_owners
from ssprop_fx.scheduling.keep_counts import KeepCounts
from ssprop_fx.scheduling.telemetry import empty_table

__all__ = ["CompiledGraph", "Instance", "Instances"]


class Instance:
    """A compiled graph, called for one group of layers.

    Args:
        graph: the graph's record; its sites have the names of these layers.
        slots: slot of the layer that the graph was compiled for -> slot of the layer that it is
            called for, or `~C` if that layer stays dense and has C output channels. None if they
            are the same layers.
        slot_count: number of slots of the model that the graph was compiled for.
        names: name of a layer that the graph was compiled for -> name of the layer that it is
            called for. Empty if they are the same layers.

    Attributes:
        is_own: whether these are the layers that the graph was compiled for.
        table: what the backward reports about its sites, one row for each slot of the model that
            the graph was compiled for. None before the first call and without telemetry.
        rows: the row of each layer that the graph is called for, by name.
        last_run: number of the last call; calls of all instances are numbered together.
    """

    _runs = itertools.count(1)

    def __init__(
        self,
        graph: GraphRecord,
        slots: Mapping[int, int] | None,
        slot_count: int,
        names: Mapping[str, str],
    ) -> None:
        self.graph = graph
        self.names = names
        self.is_own = slots is None
        self._slot_count = slot_count
        moved = [(own, other) for own, other in (slots or {}).items() if other >= 0]
        self._own = torch.tensor([own for own, _ in moved], dtype=torch.int64)
        self._others = torch.tensor([other for _, other in moved], dtype=torch.int64)
        self._dense = {own: ~other for own, other in (slots or {}).items() if other < 0}
        self._read = torch.tensor(sorted(slots or {}), dtype=torch.int64)
        own_of = {other: own for own, other in moved}
        self.rows = {
            site.name: own_of.get(site.slot, site.slot) for site in graph.sites if not site.reason
        }
        self.table: Tensor | None = None
        self.last_run = 0

    @property
    def sparse_flops(self) -> tuple[tuple[str, int], ...]:
        """For each site its layer, and the FLOPs of its sparse gradients at full size."""
        return tuple((site.name, site.sparse_flops) for site in self.graph.sites)

    @property
    def total_flops(self) -> int:
        """FLOPs of all backward convolutions and matrix products of the graph if dense."""
        return self.graph.total_flops

    def count_run(self) -> None:
        """Count a call."""
        self.graph.runs += 1
        self.last_run = next(self._runs)

    def find_table(self, device: torch.device) -> Tensor:
        """Return the table, for a backward on `device` to write."""
        if self.table is None or self.table.device != device:
            # Under DistributedDataParallel, Dynamo makes the first call itself, on fake tensors.
            with outside_modes():
                self.table = empty_table(self._slot_count, device)
        # An alias with its own version counter, as in `Memory.find`.
        return self.table.data

    def translate(self, keep_counts: Tensor) -> Tensor:
        """Return the keep counts to pass to the graph, int64 [slots].

        Args:
            keep_counts: those of the model, int64 [slots].
        """
        if self.is_own:
            return keep_counts
        seen = keep_counts.new_ones(self._slot_count)
        seen[self._own] = keep_counts[self._others]
        for slot, channels in self._dense.items():
            seen[slot] = channels
        return seen

    def agrees(self, keep_counts: Tensor, constants: Tensor) -> bool:
        """Return whether the graph's constants are right for these layers.

        They always are for the layers that the graph was compiled for.

        Args:
            keep_counts: keep counts for the graph, as `translate` returns them, int64 [slots].
            constants: keep counts that the graph was compiled with, int64 [slots].
        """
        return self.is_own or torch.equal(keep_counts[self._read], constants[self._read])


class Instances:
    """All instances of one compiled graph, found by the weights in its arguments.

    Args:
        model: the model.
        table: its slots.
        graph: the record of the graph as compiled.
        inputs: the example inputs that it was compiled for.

    Attributes:
        graph: the record.
        found: the instances seen so far, by the names of their layers.
    """

    _owners: dict[int, str]

    def __init__(
        self, model: nn.Module, table: SlotTable, graph: GraphRecord, inputs: Sequence[Any]
    ) -> None:
        self._set_model(model, table)
        self._slot_count = len(table.slots)
        self.graph = graph
        self._positions = [i for i, value in enumerate(inputs) if id(value) in self._owners]
        self._compiled_for = self._layers(inputs)
        self.found = {self._compiled_for: Instance(graph, None, self._slot_count, {})}

    def of_model(self, model: nn.Module, table: SlotTable) -> "Instances":
        """Return the instances of the same graph for the layers of another model."""
        other = copy.copy(self)
        other._set_model(model, table)
        other.found = {}
        return other

    def find(self, args: Sequence[Any]) -> Instance:
        """Return the instance for a call with these arguments."""
        layers = self._layers(args)
        if layers not in self.found:
            # Parameters may have been replaced, for example by `load_state_dict(assign=True)`.
            self._owners = weight_owners(cast(nn.Module, self._model()))
            layers = self._layers(args)
        instance = self.found.get(layers)
        if instance is None:
            instance = self.found[layers] = self._make(layers)
        return instance

    def _set_model(self, model: nn.Module, table: SlotTable) -> None:
        # A weak reference: Dynamo keeps compiled code, so the model would live for ever.
        self._model = weakref.ref(model)
        self._owners = weight_owners(model)
        self._slots = {slot.name: slot for slot in table.slots}
        self._excluded = table.excluded

    def _layers(self, args: Sequence[Any]) -> tuple[str, ...]:
        return tuple(self._owners.get(id(args[i]), "") for i in self._positions)

    def _make(self, layers: tuple[str, ...]) -> Instance:
        names = dict(zip(self._compiled_for, layers, strict=True))
        sites = tuple(self._rename(site, names) for site in self.graph.sites)
        slots = {
            own.slot: site.slot if not site.reason else ~(site.channels // site.groups)
            for own, site in zip(self.graph.sites, sites, strict=True)
            if not own.reason
        }
        return Instance(GraphRecord(sites, self.graph.total_flops), slots, self._slot_count, names)

    def _rename(self, site: Site, names: Mapping[str, str]) -> Site:
        name = names.get(site.name, site.name)
        if site.reason:
            if name == site.name:
                return site
            reason = f"runs in the compiled code of {site.name!r}: {site.reason}"
            return replace(site, name=name, reason=self._excluded.get(name, reason))
        if name not in self._slots:
            return replace(site, name=name, slot=-1, reason=self._excluded.get(name, "unknown"))
        return replace(site, name=name, slot=self._slots[name].index)


class CompiledGraph:
    """A compiled graph of the sparse variant, called with the state of one model.

    Args:
        compiled: takes the graph's own inputs, then its state inputs (`StateInputs`).
        instances: the graph's instances for the model.
        counts: the model's part of the runtime sparsity tensor, read at every call.
        memories: the memories that the graph takes as inputs.
        memory: the memories of the model.
        constants: the compiled-in keep count of each slot; None if the graph reads keep counts.
        table_device: device of the graph's telemetry table; None without telemetry.
        batch: the input that holds the batch; None if no samples are chosen.
        selection: how samples are chosen.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        instances: Instances,
        counts: KeepCounts,
        memories: Sequence[MemoryInput],
        memory: Memory,
        constants: tuple[int, ...] | None = None,
        table_device: torch.device | None = None,
        batch: BatchInput | None = None,
        selection: Selection = Selection(),
    ) -> None:
        self.compiled = compiled
        self.instances = instances
        self.counts = counts
        self.memories = memories
        self.memory = memory
        self.constants = None if constants is None else torch.tensor(constants, dtype=torch.int64)
        self.table_device = table_device
        self.batch = batch
        self.selection = selection

    def __call__(self, *args: Any) -> Any:
        """Run the graph for the layers whose weights are among its inputs.

        Raises:
            SsPropCompileError: the graph's constant keep counts are not those of these layers.
        """
        instance = self.instances.find(args)
        instance.count_run()
        self.counts.telemetry.register(instance)
        keep_counts = instance.translate(self.counts.tensor)
        if self.constants is not None and not instance.agrees(keep_counts, self.constants):
            layers = ", ".join(repr(site.name) for site in instance.graph.sites)
            raise SsPropCompileError(
                "one graph with constant keep counts serves several layers, but the keep counts of"
                f" {layers} differ from those it was compiled with: use"
                " SparsityConfig(specialize=False), or fullgraph=True, which allows no graph break"
            )
        choice = self._choice_maybe(args)
        names = instance.names
        state = StateInputs(
            table=None if self.table_device is None else instance.find_table(self.table_device),
            memories=tuple(self.memory.find(m, names.get(m.layer, m.layer)) for m in self.memories),
            keep_counts=keep_counts if self.constants is None else None,
            choice=None if choice is None else choice.count_call(),
        )
        outputs = self.compiled(*args, *state.pack())
        if choice is not None:
            choice.keep_alive(outputs)
        return outputs

    def _choice_maybe(self, args: Sequence[Any]) -> SampleChoice | None:
        """Return the choice of the forward that runs now, which knows its batch size from here on.

        None if no samples are chosen.
        """
        if self.batch is None:
            return None
        size = args[self.batch.position].shape[self.batch.dim]
        # The named backend sees graphs, not forwards: a graph shares the choice of the one before.
        choice = current_choice_maybe() or SampleChoice.behind_maybe(args, size)
        choice = choice or SampleChoice(self.selection, self.counts)
        # Under DistributedDataParallel, Dynamo makes the first call itself, on fake tensors.
        if self.instances.graph.is_sliced and isinstance(size, int):
            choice.start(size)
        return choice
