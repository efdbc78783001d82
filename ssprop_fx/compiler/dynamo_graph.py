"""Dynamo's graphs: add inputs, copy graphs, read input sizes.

Private torch: the attributes and metadata that Dynamo passes to AOTAutograd, and the fake mode of
the compile.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["copy_graph", "input_sizes", "is_differentiable", "is_fake", "with_extra_inputs"]


def with_extra_inputs(gm: fx.GraphModule, tensors: Sequence[Tensor]) -> fx.GraphModule:
    """Return a copy of Dynamo's graph with more placeholders after the existing ones.

    Args:
        gm: the graph.
        tensors: the tensors of the new placeholders, as `StateInputs.pack` returns them.

    Raises:
        RuntimeError: no input of the graph has a fake tensor.
    """
    gm = copy_graph(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    fake_mode = detect_fake_mode([p.meta.get("example_value") for p in placeholders])
    if fake_mode is None:
        raise RuntimeError("Dynamo's graph has no fake tensors among its inputs")
    # Reading a keep count makes an unbacked symbol. This needs no global `capture_scalar_outputs`.
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


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no values, as while torch traces."""
    return isinstance(tensor, FakeTensor)


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a Dynamo graph module, with all that AOTAutograd reads from it.

    Without the sources AOTAutograd would treat every parameter as an ordinary input.
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
    """Return whether a graph with these inputs has a backward."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in inputs
    )
