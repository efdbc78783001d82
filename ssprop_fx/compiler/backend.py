"""The torch.compile backend of the sparse variant: adds state inputs to a graph, then compiles it.

Private torch is in the modules that it calls: `dynamo_graph`, `inductor` and `ssprop_passes`.
"""

import copy
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.fingerprint import sources_hash
from ssprop_passes.graph.rewrite import inductor_decompositions
from ssprop_passes.graph.state_inputs import StateInputs
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.ranks import Ranks, find_ranks_maybe
from ssprop_passes.transforms.gate import Gate
from ssprop_passes.transforms.kept_samples import KeptSamplesPass
from ssprop_passes.transforms.patches import PatchPass
from ssprop_passes.transforms.sparse_backward import SparseBackwardPass
from torch import Tensor, fx, nn

from ssprop_fx.compiler.backward_state import Memory, MemoryInput
from ssprop_fx.compiler.batch_input import BatchInput, find_batch_input
from ssprop_fx.compiler.compiled_graph import CompiledGraph, Instances
from ssprop_fx.compiler.dynamo_graph import (
    copy_graph,
    is_differentiable,
    with_extra_inputs,
)
from ssprop_fx.compiler.inductor import (
    RestartAnalysis,
    compile_aot_eager,
    compile_error,
    compile_inductor,
    get_hooks,
)
from ssprop_fx.compiler.node_marks import (
    complex_layers,
    mark_layers,
    mark_memories,
    trained_layers,
)
from ssprop_fx.compiler.passes import build_passes
from ssprop_fx.compiler.sample_choice import current_choice_maybe
from ssprop_fx.compiler.site_cache import GraphRecord, load_record_maybe, record_key, save_record
from ssprop_fx.compiler.slots import COMPLEX, SlotTable, find_slots
from ssprop_fx.config import SparsityConfig
from ssprop_fx.scheduling.keep_counts import KeepCounts
from ssprop_fx.scheduling.telemetry import empty_table

__all__ = ["BACKENDS", "SparseBackend"]

BACKENDS = ("inductor", "aot_eager")

logger = logging.getLogger(__name__)


class SparseBackend:
    """What `torch.compile(backend=...)` calls to compile each graph of the sparse variant.

    Args:
        model: the model.
        config: which of its layers take part.
        table: its slots.
        counts: its part of the runtime sparsity tensor, read at every call.
        memory: what its layers have left out so far.
        kind: `"inductor"` or `"aot_eager"`.
        options: Inductor configuration patches; empty for AOT eager.
        constants: keep count of each slot, to compile in as constants. By default the graph reads
            keep counts from the runtime sparsity tensor.

    Attributes:
        instances: the instances of each graph compiled so far.
        captured: names of the layers that Dynamo captured in any graph.
        ranks: the ranks that graphs share their selection with; None stands for no other rank.
        error: the last failure. The caller raises it, whatever Dynamo does with it.
    """

    compiler_name = "ssprop"

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        table: SlotTable,
        counts: KeepCounts,
        memory: Memory,
        kind: str,
        options: dict[str, Any],
        constants: tuple[int, ...] | None = None,
    ) -> None:
        # A weak reference: Dynamo keeps its backends, so the model would live for ever.
        self._model = weakref.ref(model)
        self.config = config
        self.table = table
        self.counts = counts
        self.memory = memory
        self.kind = kind
        self.options = options
        self.constants = constants
        self._forget()

    @property
    def model(self) -> nn.Module:
        """The model."""
        return cast(nn.Module, self._model())

    @property
    def selection(self) -> Selection:
        """How channels are chosen, and which ranks choose together."""
        ranks = find_ranks_maybe() if self.config.ranks == "shared" else None
        return replace(self.config.selection, ranks=ranks)

    @property
    def graphs(self) -> list[GraphRecord]:
        """Records of the graphs compiled so far, one for each group of layers that they serve."""
        return [i.graph for instances in self.instances for i in instances.found.values()]

    @property
    def missing(self) -> list[str]:
        """Names of the layers that have a slot but that no graph captured or made sparse."""
        sparse = {site.name for graph in self.graphs for site in graph.sites if not site.reason}
        return [s.name for s in self.table.slots if s.name not in self.captured | sparse]

    def specialized(self, constants: tuple[int, ...] | None) -> "SparseBackend":
        """Return a backend for the same model with these constants and no compiled graphs."""
        other = copy.copy(self)
        other.constants = constants
        other._forget()
        return other

    def _forget(self) -> None:
        self.instances: list[Instances] = []
        self.captured: set[str] = set()
        self.error: SsPropCompileError | None = None
        self.ranks: set[Ranks | None] = set()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledGraph:
        """Compile one graph that Dynamo captured.

        Raises:
            SsPropCompileError: on any failure. Some exceptions inside a backend make Dynamo run
                eagerly, and so dense, without a message; this one does not.
        """
        try:
            return self._compile(gm, example_inputs)
        except RestartAnalysis:
            # Not a failure: Dynamo must trace again, with a Python number as a constant.
            raise
        except Exception as error:
            self.error = compile_error(error)
            raise self.error from self.error.__cause__

    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledGraph:
        if find_slots(self.model, self.config) != self.table:
            raise RuntimeError(
                "the model's layers have changed since ssprop_compile: call it again on the changed"
                " model"
            )
        self.ranks.add(self.selection.ranks)
        if gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
            raise RuntimeError(
                "the model has a torch.compiler.nested_compile_region, whose backward is compiled"
                " separately, without keep counts: set torch._dynamo.config.inline_invoke_subgraph"
                " = True (torch 2.12 and newer) or remove the region"
            )
        layers = mark_layers(gm, example_inputs, self.model)
        trained = trained_layers(example_inputs, self.model)
        excluded = {**self.table.excluded, **dict.fromkeys(complex_layers(gm), COMPLEX)}
        memories = mark_memories(gm, self.table) if self.config.memory else []
        table_device = _device(example_inputs) if self.config.telemetry else None
        slot_count = len(self.counts.tensor)
        batch, whole = self._find_batch(gm, example_inputs)
        state = StateInputs(
            table=None if table_device is None else empty_table(slot_count, table_device),
            memories=tuple(memory.zeros() for memory in memories),
            keep_counts=self.counts.tensor if self.constants is None else None,
            choice=None if batch is None else torch.zeros(2, dtype=torch.int64),
        )
        gm = with_extra_inputs(gm, state.pack())
        inputs = [*example_inputs, *state.pack()]
        gate = self._gate()
        identity = (
            sources_hash(),
            self.table.slots,
            excluded,
            layers,
            self.selection.identity,
            gate and gate.identity(),
            self.constants,
            self.config.telemetry,
        )
        key = record_key(gm, inputs, repr(identity))

        samples_pass = None
        if batch is not None:
            samples_pass = KeptSamplesPass(batch.symbol, state, self.config.saved == "kept")

        patches = None
        if batch is not None and self.config.patch > 1:
            patches = PatchPass(self.config.patch)

        def compile_graph(options: dict[str, Any]) -> tuple[Callable[..., Any], SparseBackwardPass]:
            sparse_pass = self._sparse_pass(
                excluded, layers, trained, memories, slot_count, batch is not None
            )
            passes = build_passes(
                sparse_pass, patches, self.kind, get_hooks(options, "joint_custom_pre_pass")
            )
            # Copy the graph: both compilers change it, and a second compile may need it.
            compile_with = compile_inductor if self.kind == "inductor" else compile_aot_eager
            return compile_with(copy_graph(gm), inputs, passes, options, samples_pass), sparse_pass

        compiled, sparse_pass = compile_graph(self.options)
        known = None
        if not sparse_pass.ran and is_differentiable(inputs):
            # A hit in Inductor's compile cache, or an inference graph.
            known = load_record_maybe(key)
            if known is None:
                # The cache was copied here without its records.
                compiled, sparse_pass = compile_graph(
                    {**self.options, "force_disable_caches": True}
                )
        graph = known or GraphRecord(sparse_pass.sites, sparse_pass.total_flops)
        graph.whole = whole if samples_pass is None else samples_pass.reason
        if patches is not None:
            graph.patched, graph.patch_flops = patches.summary.rewritten, patches.saved_flops
        if known is None and batch is None and self.kind == "inductor":
            save_record(key, graph)
        logger.info("graph compiled%s: %s", " before, found in the cache" if known else "", graph)
        self.captured.update(layers)
        instances = Instances(self.model, self.table, graph, example_inputs)
        return self._register(compiled, instances, memories, table_device, batch)

    def _find_batch(
        self, gm: fx.GraphModule, inputs: Sequence[Any]
    ) -> tuple[BatchInput | None, str | None]:
        """Return the input that holds the batch, and why the backward stays whole if it does.

        The reason is None if no samples are chosen.
        """
        if self.config.axis == "channel" or not is_differentiable(inputs):
            return None, None
        choice = current_choice_maybe()
        try:
            return find_batch_input(gm, inputs, self.model, choice.size if choice else 0), ""
        except ValueError as error:
            return None, str(error)

    def adopt(self, graph: CompiledGraph) -> CompiledGraph:
        """Return a graph that was compiled for another model, to run for this one."""
        instances = graph.instances.of_model(self.model, self.table)
        return self._register(
            graph.compiled, instances, graph.memories, graph.table_device, graph.batch
        )

    def _register(
        self,
        compiled: Callable[..., Any],
        instances: Instances,
        memories: Sequence[MemoryInput],
        table_device: torch.device | None,
        batch: BatchInput | None,
    ) -> CompiledGraph:
        self.instances.append(instances)
        return CompiledGraph(
            compiled,
            instances,
            self.counts,
            memories,
            self.memory,
            self.constants,
            table_device,
            batch,
            self.selection,
        )

    def _gate(self) -> Gate | None:
        # AOT eager is not for speed. Ranks that each time layers would not always agree.
        # With samples, the layers whose channels are chosen too are named one by one.
        is_off = not self.config.gate or self.config.axis == "sample"
        if is_off or self.kind != "inductor" or self.selection.ranks is not None:
            return None
        return Gate(dict(enumerate(self.counts.smallest)))

    def _sparse_pass(
        self,
        excluded: dict[str, str],
        layers: tuple[str, ...],
        trained: frozenset[str],
        memories: Sequence[MemoryInput],
        slot_count: int,
        chooses_samples: bool,
    ) -> SparseBackwardPass:
        return SparseBackwardPass(
            slots={slot.name: slot for slot in self.table.slots},
            excluded=excluded,
            layers=layers,
            slot_count=slot_count,
            decompositions=inductor_decompositions if self.kind == "inductor" else dict,
            selection=self.selection,
            gate=self._gate(),
            memories=[memory.layer for memory in memories],
            telemetry=self.config.telemetry,
            constants=self.constants,
            chooses_samples=chooses_samples,
            trained=trained,
        )


def _device(inputs: Sequence[Any]) -> torch.device:
    """Return the device of a graph's parameters, or of its first tensor if it has none."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    parameters = [value for value in tensors if isinstance(value, nn.Parameter)]
    return (parameters or tensors)[0].device
