"""Dynamo's graphs: names of layers on their nodes, further inputs, copies.

Private torch: the attributes and metadata that Dynamo leaves for AOTAutograd, the fake mode of the
compile.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from ssprop_passes.sites.site import SITE_KEY
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode

from ssprop_fx.compiler.compiled_graph import weight_owners

__all__ = ["copy_graph", "input_sizes", "is_differentiable", "mark_layers", "with_extra_inputs"]


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


def input_sizes(gm: fx.GraphModule, position: int) -> Sequence[int]:
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
