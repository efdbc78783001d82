"""TwoStepSumsPass: gradients of biases and normalisation layers, summed as they lie in memory.

A pass apart from the sparse backward, on a CPU. The backward of a batch norm sums [N, C, H, W] over
all dimensions but C. In channels last, Inductor's loop for that has the channels outside: for
every 16 of them it walks through the whole tensor, a cache line here and there. Rewritten are

    sum(x, dims)  ->  sum(sum(x, d, keepdim), dims)

with d the innermost of `dims`: the sums of one row of an image read that row as it lies in memory,
and what is left to sum is smaller by the length of a row. Only where the tensor is so large that a
core's cache does not hold it from one walk to the next.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.rewrite import Replacer, replace_node

__all__ = ["TwoStepSumsPass"]

aten = torch.ops.aten

# Bytes from which on a sum is split; smaller ones are as fast in one step or faster.
LARGE = 8 * 2**20


class TwoStepSumsPass(GraphPass):
    """Splits sums over all dimensions but the innermost, of large tensors of a backward on a CPU.

    The sums are the same except for the order of their terms. Dense training can use it, too:

        torch.compile(model, options={"joint_custom_pre_pass": TwoStepSumsPass()})
    """

    def identity(self) -> str:
        """Return the same for all: the rewrite depends on the graph alone."""
        return "two steps"

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite each such sum of a backward."""
        replacer, summary = Replacer(dict), PassSummary()
        for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
            first = _first_step_maybe(node)
            if first is not None:
                _split(replacer, node, first)
                summary.matched += 1
                summary.rewritten += 1
        return summary


def _first_step_maybe(node: fx.Node) -> int | None:
    """Return the dimension to sum over first, None where the sum stays as it is."""
    x: Tensor = _input(node).meta["val"]
    if node.meta.get("partitioner_tag") != "is_backward" or x.device.type != "cpu":
        return None
    over = {d % x.ndim for d in cast(list[int], node.args[1])}
    kept = [d for d in range(x.ndim) if d not in over]
    if len(kept) != 1 or len(over) < 2 or not x.is_floating_point():
        return None
    channels, strides = x.shape[kept[0]], x.stride()
    # Sizes that are known when the graph is compiled, so that nothing depends on the others.
    known = [d for d in over if isinstance(strides[d], int) and isinstance(x.shape[d], int)]
    first = min((d for d in known if x.shape[d] > 1), key=lambda d: strides[d], default=None)
    # The channels are innermost, and the rows next.
    if first is None or strides[kept[0]] != 1 or strides[first] != channels:
        return None
    sizes = [s if isinstance(s, int) else s.node.hint for s in x.shape]
    is_large = None not in sizes and math.prod(sizes) * x.element_size() >= LARGE
    return first if is_large else None


def _split(replacer: Replacer, node: fx.Node, first: int) -> None:
    """Replace a sum by one over `first` and one over the rest."""
    x, (_, dims, *keepdim) = _input(node), cast(tuple[Any, ...], node.args)
    dtype = cast(torch.dtype, node.kwargs.get("dtype") or x.meta["val"].dtype)
    # No rounding between the steps.
    wide = torch.promote_types(dtype, torch.float32)

    def in_two_steps(x: Tensor) -> tuple[Tensor]:
        rows = x.sum(first, keepdim=True, dtype=wide)
        return (rows.sum(dims, *keepdim, dtype=dtype),)

    key = first, tuple(dims), tuple(keepdim), dtype
    (total,) = replacer.insert(node, in_two_steps, [x], key)
    assert total is not None
    replace_node(node, total)


def _input(node: fx.Node) -> fx.Node:
    return cast(fx.Node, node.args[0])
