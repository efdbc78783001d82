"""Find gradients that are zero except at one position of each sample and channel, the winner.

The backward of a global max pooling writes the winners' gradients into zeros. What follows position
by position, such as the backward of a ReLU or of a gate, keeps the zeros.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

__all__ = ["VIEWS", "Winners", "find_winners_maybe"]

aten = torch.ops.aten

# Operations that only rename: alias, and dimensions of size 1.
VIEWS = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
)
_POOLINGS = (
    aten.max_pool2d_with_indices_backward.default,
    aten.adaptive_max_pool2d_backward.default,
)
# Operations whose result is zero where the operand of this number is zero.
_KEEP_ZEROS: dict[Any, tuple[int, ...]] = {
    aten.mul.Tensor: (0, 1),
    aten.mul.Scalar: (0,),
    aten.div.Tensor: (0,),
    aten.div.Scalar: (0,),
    aten.neg.default: (0,),
    aten.native_dropout_backward.default: (0,),
    aten.threshold_backward.default: (0,),
    aten.tanh_backward.default: (0,),
    aten.sigmoid_backward.default: (0,),
    torch.ops.prims.convert_element_type.default: (0,),
}


@dataclass(frozen=True)
class Winners:
    """Where a gradient comes from.

    Attributes:
        source: the node that writes the winners' gradients into zeros.
        gradient: the winners' gradients, N * C numbers.
        index: their positions, N * C numbers.
        path: the nodes from the source to the convolution's backward, each after its operands.
        others: what the path computes with besides: tensors [N, C, L], or broadcast to it.
    """

    source: fx.Node
    gradient: fx.Node
    index: fx.Node
    path: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]


def find_winners_maybe(grad_output: fx.Node) -> Winners | None:
    """Return where a gradient [N, C, L] comes from; None unless it is zero but at the winners."""
    shape = grad_output.meta["val"].shape
    sources: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    path: dict[fx.Node, None] = {}
    if not _keeps_zeros(grad_output, shape, sources, path) or len(sources) != 1:
        return None
    ((source, found),) = sources.items()
    operands = [operand for step in path for operand in step.all_input_nodes]
    others = tuple(o for o in dict.fromkeys(operands) if o is not source and o not in path)
    if not all(_is_like(other, shape) or _is_broadcast(other, shape) for other in others):
        return None
    return Winners(source, *found, tuple(path), others)


def _keeps_zeros(
    node: Any,
    shape: torch.Size,
    sources: dict[fx.Node, tuple[fx.Node, fx.Node]],
    path: dict[fx.Node, None],
) -> bool:
    """Say whether a node is zero wherever a source is zero.

    Args:
        node: a node, or a constant.
        shape: the shape of the gradient, [N, C, L].
        sources: takes the sources that it comes from, with the winners' gradients and positions.
        path: takes the nodes between, each after its operands.
    """
    if not isinstance(node, fx.Node) or not _is_like(node, shape):
        return False
    if node in sources or node in path:
        return True
    found = _source_maybe(node, shape[2])
    if found is not None:
        sources[node] = found
        return True
    operands = [node.args[number] for number in _KEEP_ZEROS.get(node.target, ())]
    if node.target in VIEWS:
        operands = [node.args[0]]
    elif node.target is aten.where.self:
        operands = [o for o, other in (node.args[1:], node.args[:0:-1]) if _is_zero(other)]
    if node.target is aten.add.Tensor:
        kept = all(_keeps_zeros(operand, shape, sources, path) for operand in node.args)
    else:
        kept = any(_keeps_zeros(operand, shape, sources, path) for operand in operands)
    if kept:
        path[node] = None
    return kept


def _source_maybe(node: fx.Node, length: int) -> tuple[fx.Node, fx.Node] | None:
    """Return the winners' gradients and positions if a node writes them into zeros."""
    args = cast(tuple[Any, ...], node.args)
    if node.target in (aten.scatter_add.default, aten.scatter.src):
        zeros, dim, index, gradient = args
        shape = node.meta["val"].shape
        is_last = dim % len(shape) == len(shape) - 1 and shape[-1] == length
        if _is_zero(zeros) and is_last and index.meta["val"].shape[-1] == 1:
            return gradient, index
    if node.target is aten.value_selecting_reduction_backward.default:
        gradient, dim, index, sizes, _ = args
        if len(sizes) == 3 and dim % 3 == 2:
            return gradient, index
    if node.target in _POOLINGS:
        gradient, input_, *_, index = args
        sizes = [operand.meta["val"].shape[2:] for operand in (gradient, input_)]
        if sizes == [(1, 1), (1, length)]:
            return gradient, index
    return None


def _is_like(node: fx.Node, shape: torch.Size) -> bool:
    """Say whether a node is a tensor of this shape but for merged or additional dimensions."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (
        value.numel() == shape.numel() and value.shape[-1] == shape[-1]
    )


def _is_broadcast(node: fx.Node, shape: torch.Size) -> bool:
    """Say whether a node is a tensor that torch expands to this shape."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (
        value.ndim <= len(shape)
        and all(n in (1, m) for n, m in zip(reversed(value.shape), reversed(shape), strict=False))
    )


def _is_zero(node: Any) -> bool:
    """Say whether a node is a constant zero."""
    if not isinstance(node, fx.Node):
        return bool(node == 0)
    if node.target in (aten.full.default, aten.full_like.default):
        return bool(node.args[1] == 0)
    if node.target is aten.scalar_tensor.default:
        return bool(node.args[0] == 0)
    return node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
