"""TwoStepSumsPass: sums the gradients of biases and normalisation layers in memory order.

This pass is for CPUs, and independent of the sparse backward. The backward of a batch norm sums
[N, C, H, W] over all dimensions except C. In channels last, Inductor makes the channel loop the
outer one: for every 16 channels it walks through the whole tensor and reads scattered cache lines.
The pass rewrites

    sum(x, dims)  ->  sum(sum(x, d, keepdim), dims)

where d is the innermost of `dims`. The sums over one row of an image then read that row in memory
order, and what is left to sum is smaller by a factor, the length of a row. The pass does this only
if the tensor is so large that a core's cache does not hold it from one walk to the next.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.rewrite import Replacer, replace_node

__all__ = ["TwoStepSumsPass"]

aten = torch.ops.aten

# Smallest size in bytes of a tensor whose sum is split; smaller ones are no slower in one step.
LARGE = 8 * 2**20


class TwoStepSumsPass(GraphPass):
    """Splits a backward's sums of large CPU tensors over all dimensions except the innermost.

    The sums are the same except for the order of their terms. Dense training can use the pass, too:

        torch.compile(model, options={"joint_custom_pre_pass": TwoStepSumsPass()})
    """

    def identity(self) -> str:
        """Return a constant: the rewrite depends only on the graph."""
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
    """Return the dimension to sum over first, None if the sum stays unchanged."""
    x: Tensor = _input(node).meta["val"]
    if node.meta.get("partitioner_tag") != "is_backward" or x.device.type != "cpu":
        return None
    over = {d % x.ndim for d in cast(list[int], node.args[1])}
    kept = [d for d in range(x.ndim) if d not in over]
    if len(kept) != 1 or len(over) < 2 or not x.is_floating_point():
        return None
    channels, strides = x.shape[kept[0]], x.stride()
    # Use only sizes and strides that are known at compile time, so nothing depends on the others.
    known = [d for d in over if isinstance(strides[d], int) and isinstance(x.shape[d], int)]
    first = min((d for d in known if x.shape[d] > 1), key=lambda d: strides[d], default=None)
    # The channels must be innermost, and the rows next.
    if first is None or strides[kept[0]] != 1 or strides[first] != channels:
        return None
    sizes = [s if isinstance(s, int) else s.node.hint for s in x.shape]
    is_large = None not in sizes and math.prod(sizes) * x.element_size() >= LARGE
    return first if is_large else None


def _split(replacer: Replacer, node: fx.Node, first: int) -> None:
    """Replace a sum by one over `first` and one over the rest."""
    x, (_, dims, *keepdim) = _input(node), cast(tuple[Any, ...], node.args)
    dtype = cast(torch.dtype, node.kwargs.get("dtype") or x.meta["val"].dtype)
    # Do not round between the steps.
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
