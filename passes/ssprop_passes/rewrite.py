"""Trace a replacement function and splice it into a graph in place of a node.

Private torch: `make_fx`'s dispatcher context, `ShapeEnv` via the fake mode, node metadata.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "INSERTED_KEY",
    "find_sum_maybe",
    "replace_node",
    "replace_outputs",
    "splice",
    "trace",
]

# Marks, in `node.meta`, what a pass inserted, so that a second run leaves it alone.
INSERTED_KEY = "ssprop"

# Metadata that a replacement inherits from the node that it stands for.
_INHERITED = ("stack_trace", "seq_nr", "custom", "fwd_nn_module_stack", "fwd_source_fn_stack")


def trace(
    fn: Callable[..., Any],
    inputs: Sequence[fx.Node],
    fake_mode: FakeTensorMode,
    decompositions: dict[Any, Callable[..., Any]],
) -> fx.GraphModule:
    """Trace `fn` on the fake values of `inputs` into a graph of aten operators.

    Args:
        fn: a function of as many tensors as `inputs`.
        inputs: nodes that carry `meta["val"]`.
        fake_mode: the mode that owns these values; its shape environment gets the new symbols.
        decompositions: decomposition table of the compiler that the graph is for.

    Returns:
        The traced graph module; each of its nodes carries `meta["val"]`.
    """
    values = [node.meta["val"] for node in inputs]
    with fake_mode, enable_python_dispatcher():
        traced = make_fx(fn, decompositions, tracing_mode="real")(*values)
    traced.graph.eliminate_dead_code()
    return traced


def splice(
    graph: fx.Graph, before: fx.Node, traced: fx.GraphModule, inputs: Sequence[fx.Node]
) -> tuple[fx.Node | None, ...]:
    """Copy a traced graph into `graph` before a backward node.

    Writes to an input go to the end of `graph`. What reads an input that is written is never moved
    to the forward, which would see the value before the backwards that come in between.

    Args:
        graph: the joint graph.
        before: the node that the copy is going to replace; its metadata is inherited.
        traced: graph module with as many placeholders as `inputs` has entries.
        inputs: nodes of `graph` to stand for the placeholders.

    Returns:
        The nodes that stand for the traced graph's outputs.
    """
    environment: dict[fx.Node, fx.Node] = {}
    remaining = iter(inputs)
    written = {node.args[0] for node in traced.graph.nodes if _is_write(node)}
    end = graph.output_node()
    inherited = {key: before.meta[key] for key in _INHERITED if key in before.meta}
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                environment[node] = next(remaining)
            elif node.op == "output":
                outputs = node.args[0]
            else:
                assert node.op == "call_function", f"replacement traced to {node.format_node()}"
                copy = graph.node_copy(node, environment.__getitem__)
                copy.meta.update(inherited, **{INSERTED_KEY: True})
                is_bound = _is_write(node) or not written.isdisjoint(node.all_input_nodes)
                copy.meta["partitioner_tag"] = "must_be_in_backward" if is_bound else "is_backward"
                environment[node] = copy
                if _is_write(node):
                    end.prepend(copy)
    return tuple(None if out is None else environment[out] for out in outputs)


def replace_node(node: fx.Node, replacement: fx.Node) -> None:
    """Let the users of a node use `replacement` instead, and erase it."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def find_sum_maybe(grad_output: fx.Node, dim: int, node: fx.Node) -> fx.Node | None:
    """Return the backward node that sums `grad_output` into the bias gradient of a layer.

    Args:
        grad_output: gradient of the layer's output.
        dim: its channel dimension.
        node: a backward node of the layer.
    """
    over = [d for d in range(grad_output.meta["val"].ndim) if d != dim]
    for user in grad_output.users:
        if (
            user.target is torch.ops.aten.sum.dim_IntList
            and sorted(cast(list[int], user.args[1])) == over
            and user.meta.get("partitioner_tag") == "is_backward"
            and user.meta.get("custom") == node.meta.get("custom")
            and not user.meta.get(INSERTED_KEY)
        ):
            return user
    return None


def replace_outputs(node: fx.Node, outputs: Sequence[fx.Node | None]) -> None:
    """Let the users of a node with several results use `outputs` instead where not None."""
    for user in list(node.users):
        assert user.target is operator.getitem, f"{node} is used by {user.format_node()}"
        replacement = outputs[cast(int, user.args[1])]
        if replacement is not None:
            user.replace_all_uses_with(replacement)
        if not user.users:
            node.graph.erase_node(user)


def _is_write(node: fx.Node) -> bool:
    """Say whether a node changes one of its operands, in the replacements the first."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
