"""Trace a replacement function and put it into a graph in place of a node.

Private torch: `make_fx`'s dispatcher context, `ShapeEnv` via the fake mode, node metadata,
Inductor's decompositions.
"""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "INSERTED_KEY",
    "Replacer",
    "find_sum_maybe",
    "inductor_decompositions",
    "replace_node",
    "replace_outputs",
]

# Key in `node.meta` that marks the nodes a pass inserted, so that a second run leaves them alone.
INSERTED_KEY = "ssprop"

# Metadata that a replacement inherits from the node it replaces.
_INHERITED = ("stack_trace", "seq_nr", "custom", "fwd_nn_module_stack", "fwd_source_fn_stack")


class Replacer:
    """Traces functions, and inserts copies of the traces into graphs.

    Args:
        decompositions: returns the decomposition table of the compiler that gets the graphs.
    """

    def __init__(self, decompositions: Callable[[], dict[Any, Callable[..., Any]]]) -> None:
        self.decompositions = decompositions
        self._traced: dict[Hashable, fx.GraphModule] = {}

    def insert(
        self,
        before: fx.Node,
        fn: Callable[..., Any],
        inputs: Sequence[fx.Node],
        key: Hashable = None,
    ) -> tuple[fx.Node | None, ...]:
        """Trace a function, and insert its aten operators before a backward node.

        Writes to an input go to the end of the graph. A node that reads a written input never moves
        to the forward: it would see the value from before the backwards that run in between.

        Args:
            before: the node to be replaced; the new nodes inherit its metadata.
            fn: takes one tensor or number for each of `inputs`, and returns a tuple.
            inputs: nodes that carry `meta["val"]`.
            key: identifies what `fn` computes from inputs of a given form. Calls with equal keys
                and inputs of the same form share one trace. None traces every call.

        Returns:
            The nodes of the function's results, None for a result that is None.
        """
        form = None if key is None else _form_maybe(inputs)
        if form is None:
            return _splice(before, self._trace(fn, inputs), inputs)
        is_known = (key, form) in self._traced
        if not is_known:
            self._traced[key, form] = self._trace(fn, inputs)
        return _splice(before, self._traced[key, form], inputs, with_own_values=is_known)

    def _trace(self, fn: Callable[..., Any], inputs: Sequence[fx.Node]) -> fx.GraphModule:
        values = [node.meta["val"] for node in inputs]
        # The fake mode's shape environment gets the new symbols.
        with _fake_mode(inputs), enable_python_dispatcher():
            traced = make_fx(fn, self.decompositions(), tracing_mode="real")(*values)
        traced.graph.eliminate_dead_code()
        return traced


def _fake_mode(nodes: Sequence[fx.Node]) -> FakeTensorMode:
    values = (node.meta["val"] for node in nodes)
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def _form_maybe(inputs: Sequence[fx.Node]) -> Hashable:
    """Return all that a trace sees of its inputs; None unless all are tensors of fixed sizes."""
    values = [node.meta["val"] for node in inputs]
    if not all(isinstance(value, Tensor) for value in values):
        return None
    form = tuple((tuple(v.shape), v.stride(), v.dtype, v.device) for v in values)
    numbers = [n for shape, stride, *_ in form for n in (*shape, *stride)]
    # A trace distinguishes one input given twice from two inputs.
    same = tuple(next(i for i, other in enumerate(values) if other is v) for v in values)
    return (form, same) if all(isinstance(n, int) for n in numbers) else None


def _splice(
    before: fx.Node,
    traced: fx.GraphModule,
    inputs: Sequence[fx.Node],
    with_own_values: bool = False,
) -> tuple[fx.Node | None, ...]:
    """Copy a traced graph before a node; make new fake values if other nodes have the trace's."""
    graph = before.graph
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
                if with_own_values:
                    copy.meta["val"] = _value(copy, inputs)
                environment[node] = copy
                if _is_write(node):
                    end.prepend(copy)
    return tuple(None if out is None else environment[out] for out in outputs)


def _value(node: fx.Node, inputs: Sequence[fx.Node]) -> Any:
    """Compute the fake value of a node from the fake values of its operands."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    with _fake_mode(inputs), enable_python_dispatcher():
        return cast(Callable[..., Any], node.target)(*args, **kwargs)


def replace_node(node: fx.Node, replacement: fx.Node) -> None:
    """Make the users of a node use `replacement` instead, and erase the node."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the decompositions with which Inductor traces joint graphs."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def find_sum_maybe(grad_output: fx.Node, dim: int, node: fx.Node) -> fx.Node | None:
    """Return the backward node that sums `grad_output` to a layer's bias gradient, None if none.

    Args:
        grad_output: gradient of the layer's output.
        dim: channel dimension of `grad_output`.
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
    """Make the users of a node's results use `outputs` instead; a None leaves that result."""
    for user in list(node.users):
        assert user.target is operator.getitem, f"{node} is used by {user.format_node()}"
        replacement = outputs[cast(int, user.args[1])]
        if replacement is not None:
            user.replace_all_uses_with(replacement)
        if not user.users:
            node.graph.erase_node(user)


def _is_write(node: fx.Node) -> bool:
    """Say whether a node writes to an operand; in replacements that is the first one."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
