"""The torch.compile backend of the sparse variant: adds the runtime tensor, then compiles.

Private torch lives here and in `ssprop_passes`: Dynamo's graph attributes, the fake mode of the
compile, Inductor's `compile_fx` and the two hooks for a pass on the joint graph.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.gate import Gate
from ssprop_passes.graph_pass import sources_hash
from ssprop_passes.ranks import Ranks, find_ranks_maybe
from ssprop_passes.selection import Selection
from ssprop_passes.sites import SITE_KEY
from ssprop_passes.sparse_backward import SparseBackwardPass
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._guards import detect_fake_mode

from ssprop_fx.config import SparsityConfig
from ssprop_fx.instances import SEVERAL_GRAPHS, Instances, SparseGraph, weight_owners
from ssprop_fx.memory import Memory, MemoryInput, mark_memories
from ssprop_fx.records import CompiledGraph, load_record_maybe, record_key, save_record
from ssprop_fx.samples import find_batch_maybe, mark_samples
from ssprop_fx.scheduler import KeepCounts
from ssprop_fx.slots import SlotTable, find_slots
from ssprop_fx.telemetry import empty_table

__all__ = ["BACKENDS", "SparseBackend"]

BACKENDS = ("inductor", "aot_eager")


class SparseBackend:
    """What `torch.compile(backend=...)` calls to compile each graph of the sparse variant.

    Args:
        model: the model.
        config: which of its layers take part.
        table: its slots.
        keep_counts: its part of the runtime sparsity tensor, read at every call.
        memory: what its layers have left out so far.
        kind: `"inductor"` or `"aot_eager"`.
        options: Inductor configuration patches; empty for AOT eager.
        constants: keep count of each slot, to compile in as constants; by default they are read
            from the runtime sparsity tensor.

    Attributes:
        instances: those of each graph compiled so far.
        captured: names of the layers that Dynamo captured in any graph.
        ranks: those that the graphs share their selection with, None being no other.
        error: the first failure, for the caller to raise whatever Dynamo makes of it.
    """

    compiler_name = "ssprop"

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        table: SlotTable,
        keep_counts: KeepCounts,
        memory: Memory,
        kind: str,
        options: dict[str, Any],
        constants: tuple[int, ...] | None = None,
    ) -> None:
        # Weakly: Dynamo keeps its backends, and with them the model would live for ever.
        self._model = weakref.ref(model)
        self.config = config
        self.table = table
        self.keep_counts = keep_counts
        self.memory = memory
        self.kind = kind
        self.options = options
        self.constants = constants
        self.instances: list[Instances] = []
        self.captured: set[str] = set()
        self.error: SsPropCompileError | None = None
        self.ranks: set[Ranks | None] = set()
        keep_counts.telemetry.follow(self)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return cast(nn.Module, self._model())

    @property
    def selection(self) -> Selection:
        """How channels are chosen, and by which ranks together."""
        ranks = find_ranks_maybe() if self.config.ranks == "shared" else None
        return replace(self.config.selection, ranks=ranks)

    @property
    def graphs(self) -> list[CompiledGraph]:
        """The graphs compiled so far, one for each group of layers that they were called for."""
        return [i.graph for instances in self.instances for i in instances.found.values()]

    @property
    def missing(self) -> list[str]:
        """Names of the layers that have a slot and are in no graph that makes them sparse."""
        sparse = {site.name for graph in self.graphs for site in graph.sites if not site.reason}
        return [s.name for s in self.table.slots if s.name not in self.captured | sparse]

    @property
    def sparse_runs(self) -> int:
        """How often a graph with a rewritten site was called."""
        return sum(graph.runs for graph in self.graphs if graph.is_sparse)

    def specialized(self, constants: tuple[int, ...] | None) -> "SparseBackend":
        """Return a backend for the same model with these constants, which has compiled nothing."""
        return SparseBackend(
            self.model,
            self.config,
            self.table,
            self.keep_counts,
            self.memory,
            self.kind,
            self.options,
            constants,
        )

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> SparseGraph:
        """Compile one graph that Dynamo captured.

        Raises:
            SsPropCompileError: on any failure. Some exceptions raised inside a backend make Dynamo
                fall back to eager, dense execution without a word; this one does not.
        """
        try:
            return self._compile(gm, example_inputs)
        except TensorifyScalarRestartAnalysis:
            # No failure: Dynamo is to trace again, with a Python number as a constant.
            raise
        except Exception as error:
            self.error = compile_error(error)
            raise self.error  # noqa: B904, its cause is set

    def _compile(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> SparseGraph:
        if find_slots(self.model, self.config) != self.table:
            raise RuntimeError(
                "the model's layers have changed since ssprop_compile: call it again, on the"
                " changed model"
            )
        self.ranks.add(self.selection.ranks)
        if gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph):
            raise RuntimeError(
                "the model has a torch.compiler.nested_compile_region, whose backward is compiled"
                " apart, without keep counts: set torch._dynamo.config.inline_invoke_subgraph ="
                " True (from torch 2.15 on) or leave the region out"
            )
        layers = mark_layers(gm, example_inputs, self.model)
        memories = mark_memories(gm, self.table) if self.config.memory else ()
        device = _device(example_inputs) if self.config.telemetry else None
        table = [] if device is None else [empty_table(len(self.table.slots), device)]
        batch = self._batch_maybe(gm, example_inputs, layers)
        extra = [*table, *(memory.zeros() for memory in memories)]
        if self.constants is None:
            extra.append(self.keep_counts.tensor)
        gm = with_extra_inputs(gm, extra)
        inputs = [*example_inputs, *extra]
        gate = self._gate()
        identity = (
            sources_hash(),
            self.table.slots,
            self.table.excluded,
            layers,
            self.selection.identity,
            gate and gate.identity(),
            self.constants,
            self.config.telemetry,
            batch,
        )
        key = record_key(gm, inputs, repr(identity))

        compiled, sparse_pass = self._compile_with_pass(
            gm, inputs, layers, memories, batch, self.options
        )
        known = None
        if not sparse_pass.ran and is_differentiable(inputs):
            # A hit in Inductor's compile cache, or an inference graph.
            known = load_record_maybe(key)
            if known is None:
                # The cache was brought from elsewhere, without its records.
                options = {**self.options, "force_disable_caches": True}
                compiled, sparse_pass = self._compile_with_pass(
                    gm, inputs, layers, memories, batch, options
                )
        graph = known or CompiledGraph(sparse_pass.sites, sparse_pass.total_flops)
        if known is None and self.kind == "inductor":
            save_record(key, graph)
        self.captured.update(layers)
        instances = Instances(self.model, self.table, graph, example_inputs)
        return self._register(compiled, instances, memories, device, batch)

    def _batch_maybe(
        self, gm: fx.GraphModule, inputs: Sequence[Any], layers: tuple[str, ...]
    ) -> int | None:
        """Return the position of the input that has the batch, None where channels are chosen."""
        if self.config.axis == "channel":
            return None
        sparse = {slot.name for slot in self.table.slots}
        now, before = sparse & set(layers), sparse & self.captured
        if now and before and now.isdisjoint(before):
            raise RuntimeError(SEVERAL_GRAPHS)
        position = find_batch_maybe(gm, inputs, self.model)
        if position is not None:
            mark_samples(gm, _sizes(gm, position)[0])
            self.keep_counts.follow_batch(int(inputs[position].shape[0]))
        return position

    def adopt(self, graph: SparseGraph) -> SparseGraph:
        """Return a graph that was compiled for another model, to run for this one."""
        instances = graph.instances.of_model(self.model, self.table)
        return self._register(
            graph.compiled, instances, graph.memories, graph.telemetry, graph.batch
        )

    def _register(
        self,
        compiled: Callable[..., Any],
        instances: Instances,
        memories: Sequence[MemoryInput],
        telemetry: torch.device | None,
        batch: int | None,
    ) -> SparseGraph:
        self.instances.append(instances)
        return SparseGraph(
            compiled,
            instances,
            self.keep_counts,
            memories,
            self.memory,
            self.constants,
            telemetry,
            batch,
        )

    def _gate(self) -> Gate | None:
        # Speed is not what AOT eager is for, and ranks that time layers would not always agree.
        if not self.config.gate or self.kind != "inductor" or self.selection.ranks is not None:
            return None
        return Gate(dict(enumerate(self.keep_counts.smallest)))

    def _compile_with_pass(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        layers: tuple[str, ...],
        memories: Sequence[MemoryInput],
        batch: int | None,
        options: dict[str, Any],
    ) -> tuple[Callable[..., Any], SparseBackwardPass]:
        is_inductor = self.kind == "inductor"
        hook = torch._inductor.config.joint_custom_pre_pass
        sparse_pass = SparseBackwardPass(
            slots={slot.name: slot for slot in self.table.slots},
            excluded=self.table.excluded,
            layers=layers,
            slot_count=len(self.table.slots),
            decompositions=_inductor_decompositions if is_inductor else dict,
            selection=self.selection,
            gate=self._gate(),
            memories=[memory.layer for memory in memories],
            telemetry=self.config.telemetry,
            batch=None if batch is None else _sizes(gm, batch)[0],
            previous=options.get("joint_custom_pre_pass", hook) if is_inductor else None,
            constants=self.constants,
        )
        compile_graph = compile_inductor if is_inductor else compile_aot_eager
        # Both compilers take ownership of the graph, and it may be needed a second time.
        return compile_graph(copy_graph(gm), inputs, sparse_pass, options), sparse_pass


def compile_error(error: Exception) -> SsPropCompileError:
    """Return the error that the user sees for a failure inside the compiler, its cause set."""
    if isinstance(error, SsPropCompileError):
        return error
    ours = SsPropCompileError(
        f"the sparse variant of the model could not be compiled: {type(error).__name__}: {error}"
    )
    ours.__cause__ = error
    return ours


def compile_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    sparse_pass: SparseBackwardPass,
    options: dict[str, Any],
) -> Callable[..., Any]:
    """Compile a graph with Inductor, the pass in its joint-graph hook."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    @functools.wraps(compile_fx_inner)
    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        # The backward compiles later, out of `SparseBackend.__call__`.
        try:
            return compile_fx_inner(*args, **kwargs)
        except Exception as error:
            raise compile_error(error)  # noqa: B904, its cause is set

    # As patches and not as an ambient setting, because the backward compiles later.
    patches = {**options, "joint_custom_pre_pass": sparse_pass}
    compiled = compile_fx(gm, inputs, compile_inner, config_patches=patches)
    return cast(Callable[..., Any], compiled)


def compile_aot_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    sparse_pass: Callable[[fx.Graph], None],
    options: dict[str, Any],
) -> Callable[..., Any]:
    """Compile a graph with AOTAutograd alone: slow to run, quick to compile."""

    def joint_pass(joint: fx.GraphModule, _inputs: Any) -> fx.GraphModule:
        sparse_pass(joint.graph)
        joint.recompile()
        return joint

    with torch._functorch.config.patch(joint_custom_pass=joint_pass):
        return lookup_backend("aot_eager")(gm, list(inputs))


def mark_layers(
    gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module
) -> tuple[str, ...]:
    """Write into each node's metadata the name of the layer that it belongs to.

    AOTAutograd copies `meta["custom"]` to the backward nodes. A node that takes a layer's weight
    belongs to that layer, any other node to the innermost module whose forward it stems from.
    Both are found by the identity of an object: the paths in Dynamo's metadata start at whatever
    frame is being compiled, and after a graph break that is not the model.

    Args:
        gm: the graph that Dynamo captured; subgraphs are marked as well.
        example_inputs: its inputs.
        model: the model.

    Returns:
        The names, in order of the marked nodes.
    """
    modules = {id(module): name for name, module in model.named_modules()}
    owners = weight_owners(model)
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = {
        node: owners[id(value)]
        for node, value in zip(placeholders, example_inputs, strict=True)
        if id(value) in owners
    }
    layers: list[str] = []
    for graph_module in gm.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, fx.GraphModule) else ():
            if node.op not in ("call_function", "call_method"):
                continue
            owned = [weights[operand] for operand in node.all_input_nodes if operand in weights]
            name = owned[0] if len(owned) == 1 else _innermost_module_maybe(node, modules)
            if name is not None:
                node.meta["custom"] = {**(node.meta.get("custom") or {}), SITE_KEY: name}
                layers.append(name)
    return tuple(layers)


def _innermost_module_maybe(node: fx.Node, names: dict[int, str]) -> str | None:
    """Return the name of the innermost module whose forward a node stems from."""
    # Keys are `id(module)`, or `id(module)@n` from the second call of the module on.
    stack = [str(key).split("@")[0] for key in node.meta.get("nn_module_stack") or {}]
    return names.get(int(stack[-1])) if stack and stack[-1].isdigit() else ""


def with_extra_inputs(gm: fx.GraphModule, tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Return a copy of Dynamo's graph with more placeholders, after all others.

    Args:
        gm: the graph.
        tensors: what they stand for: table, memories, and the runtime sparsity tensor at the end.
    """
    gm = copy_graph(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    fake_mode = detect_fake_mode([p.meta.get("example_value") for p in placeholders])
    if fake_mode is None:
        raise RuntimeError("Dynamo's graph has no fake tensors among its inputs")
    # Reading a keep count makes an unbacked symbol. No global `capture_scalar_outputs`.
    fake_mode.allow_scalar_outputs = True
    last = placeholders[-1] if placeholders else gm.graph._root
    for number, tensor in enumerate(tensors):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"ssprop_state_{number}")
        last.meta["example_value"] = fake_mode.from_tensor(tensor.clone(), static_shapes=True)
        last._dynamo_source = None
    gm.recompile()
    return gm


def _sizes(gm: fx.GraphModule, position: int) -> Sequence[int]:
    """Return the shape of an input, with SymInts for dynamic sizes."""
    placeholder = gm.graph.find_nodes(op="placeholder")[position]
    return cast(Tensor, placeholder.meta["example_value"]).shape


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a Dynamo graph module with what AOTAutograd reads from it.

    Without the sources every parameter would count as an ordinary input.
    """
    graph = fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, environment, return_output_node=True)
    value, old_output = output if isinstance(output, tuple) else (output, None)
    graph.output(value).meta = dict(old_output.meta) if old_output is not None else {}
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for old, new in environment.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def is_differentiable(inputs: Sequence[Any]) -> bool:
    """Say whether a graph of these inputs has a backward."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in inputs
    )


def _device(inputs: Sequence[Any]) -> torch.device:
    """Return the device of a graph's parameters, of its first tensor if it has none."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    parameters = [value for value in tensors if isinstance(value, nn.Parameter)]
    return (parameters or tensors)[0].device


def _inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()
