"""Node marks: metadata that AOTAutograd copies from a forward node to its backward nodes.

Each mark is an entry of `node.meta["custom"]` in the graph that Dynamo captured: the layer of a
node, and the number of a call that has a memory.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from ssprop_passes.selection.error_feedback import MEMORY_KEY
from ssprop_passes.selection.gather_scatter import is_channels_last
from ssprop_passes.sites.site import SITE_KEY, layer_name
from torch import Tensor, fx, nn
from torch.nn import functional

from ssprop_fx.compiler.backward_state import MemoryInput
from ssprop_fx.compiler.slots import SlotTable, weight_owners

__all__ = ["LAYER_CALLS", "complex_layers", "mark_layers", "mark_memories", "trained_layers"]

# Calls that take the weight of a layer in the graph that Dynamo captures.
LAYER_CALLS = (
    functional.linear,
    torch.addmm,
    *(getattr(functional, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
)


def mark_layers(
    gm: fx.GraphModule, example_inputs: Sequence[Any], model: nn.Module
) -> tuple[str, ...]:
    """Write the name of its layer into each node's metadata.

    AOTAutograd copies `meta["custom"]` to the backward nodes. A node that takes a layer's weight
    belongs to that layer, any other node to the innermost module whose forward made it. Both are
    found by object identity: paths in Dynamo's metadata start at the frame being compiled, which
    after a graph break is not the model's.

    Args:
        gm: the graph that Dynamo captured; subgraphs are marked as well.
        example_inputs: its inputs.
        model: the model.

    Returns:
        The names, in the order of the marked nodes.
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


def trained_layers(example_inputs: Sequence[Any], model: nn.Module) -> frozenset[str]:
    """Return the names of the layers whose weights are among a graph's inputs and get a gradient.

    Args:
        example_inputs: the graph's inputs.
        model: the model.
    """
    owners = weight_owners(model)
    trained = [x for x in example_inputs if isinstance(x, Tensor) and x.requires_grad]
    return frozenset(owners[id(weight)] for weight in trained if id(weight) in owners)


def complex_layers(gm: fx.GraphModule) -> set[str]:
    """Return the names of the layers whose calls return complex numbers.

    Args:
        gm: the graph that Dynamo captured, marked by `mark_layers`; subgraphs are searched as well.
    """
    calls = [
        node
        for graph_module in gm.modules()
        for node in (graph_module.graph.nodes if isinstance(graph_module, fx.GraphModule) else ())
        if node.target in LAYER_CALLS and isinstance(node.meta.get("example_value"), Tensor)
    ]
    names = [layer_name(node) for node in calls if node.meta["example_value"].is_complex()]
    return {name for name in names if name is not None}


def _innermost_module_maybe(node: fx.Node, names: dict[int, str]) -> str | None:
    """Return the name of the innermost module whose forward made a node.

    "" if Dynamo recorded no module, None if `names` does not have it.
    """
    # Keys are `id(module)`, or `id(module)@n` from the second call of the module on.
    stack = [str(key).split("@")[0] for key in node.meta.get("nn_module_stack") or {}]
    return names.get(int(stack[-1])) if stack and stack[-1].isdigit() else ""


def mark_memories(gm: fx.GraphModule, table: SlotTable) -> list[MemoryInput]:
    """Number the calls of layers with a slot, and write the numbers into their metadata.

    Args:
        gm: the graph that Dynamo captured, marked by `mark_layers`; subgraphs are marked as well.
        table: the model's slots.

    Returns:
        The memories, one for each call. If Dynamo treats one of their sizes as dynamic, a guard
        fixes it.
    """
    slots = {slot.name for slot in table.slots}
    calls: Counter[str] = Counter()
    memories: list[MemoryInput] = []
    for graph_module in gm.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, fx.GraphModule) else ():
            name = layer_name(node)
            output = node.meta.get("example_value")
            if (
                name not in slots
                or node.target not in LAYER_CALLS
                or not isinstance(output, Tensor)
            ):
                continue
            node.meta["custom"][MEMORY_KEY] = calls.total()
            memories.append(_memory_of(output, node.target, name, calls[name]))
            calls[name] += 1
    return memories


def _memory_of(output: Tensor, call: object, layer: str, number: int) -> MemoryInput:
    """Return the memory of a call, given the fake value of its output."""
    if call in (functional.linear, torch.addmm):
        dims = [-1]
    else:
        # A single sample may come without a batch dimension.
        spatial = next(n for n in (1, 2, 3) if f"{n}d" in getattr(call, "__name__", ""))
        dims = list(range(-1 - spatial, 0))
    shape = tuple(int(output.shape[dim]) for dim in dims)
    order = [*range(1, len(shape)), 0] if is_channels_last(output) else range(len(shape))
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    dtype = torch.promote_types(output.dtype, torch.float32)
    return MemoryInput(layer, number, shape, tuple(strides), dtype, output.device)
