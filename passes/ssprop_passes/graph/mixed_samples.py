"""Operations that move samples or mix them, such as `x.flip(0)`: no sample can be left out then."""

from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from ssprop_passes.graph.batch_dim import BATCH_DIM_KEY, BatchDim, batch_dim_maybe, size_expr

__all__ = ["RESHAPES", "operand_dims", "refuse_cuts", "refuse_mixing"]

aten = torch.ops.aten

RESHAPES = (aten.view, aten._unsafe_view, aten.reshape)

# The argument with the dimension, or dimensions, along which these move or mix values.
_ALONG = {
    aten.flip: 1,
    aten.roll: 2,
    aten.cumsum: 1,
    aten.cumprod: 1,
    aten.logcumsumexp: 1,
    aten.cummax: 1,
    aten.cummin: 1,
    aten._softmax: 1,
    aten._log_softmax: 1,
    aten.sort: 1,
    aten.argsort: 1,
    aten.topk: 2,
    aten.select: 1,
    aten.gather: 1,
    aten.scatter: 1,
    aten.scatter_add: 1,
    aten.scatter_reduce: 1,
    aten.index_select: 1,
    aten.index_add: 1,
    aten.index_copy: 1,
    aten.index_fill: 1,
}

# The argument with the dimension along which these take some rows.
_CUTS = {aten.slice: 1, aten.split: 2, aten.split_with_sizes: 2}

# These mix values along all dimensions except the first two.
_SPATIAL = (
    aten.convolution,
    *(aten.avg_pool2d, aten.max_pool2d_with_indices),
    *(aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_nearest2d),
)

# The argument with the indices, one for each dimension.
_INDEXED = {aten.index: 1, aten._unsafe_index: 1, aten.index_put: 1, aten._unsafe_index_put: 1}


def refuse_mixing(node: fx.Node) -> None:
    """Raise a ValueError if a node moves samples, or mixes them into other samples."""
    packet = getattr(node.target, "overloadpacket", None)
    if _returns_any_number_of_rows(node) and operand_dims(node):
        raise ValueError("returns as many rows as its values say")
    if packet not in (*_ALONG, *_INDEXED, *_SPATIAL):
        return
    operand = cast(fx.Node, node.args[0])
    position: BatchDim | None = operand.meta.get(BATCH_DIM_KEY)
    if position is None:
        return
    if packet in _SPATIAL:
        if position.dim > 1:
            raise ValueError("moves or mixes samples")
        return
    ndim = operand.meta["val"].ndim
    if packet in _INDEXED:
        indices = cast(Any, node.args[_INDEXED[packet]])
        index = indices[position.dim] if position.dim < len(indices) else None
        is_fixed = index is None or (position.is_plain and _counts_samples(index))
        if not is_fixed:
            raise ValueError("looks up samples by index")
        return
    # Without dimensions `roll` flattens its operand; the others take the last one.
    default: Any = [] if packet is aten.roll else -1
    along = node.args[_ALONG[packet]] if len(node.args) > _ALONG[packet] else default
    dims = along if isinstance(along, (list, tuple)) else [along]
    if not dims or position.dim in {cast(int, d) % ndim for d in dims}:
        raise ValueError("moves or mixes samples")


def refuse_cuts(node: fx.Node, batch: sympy.Symbol) -> None:
    """Raise a ValueError if a node takes rows that are not of all samples in their order."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in _CUTS and packet is not aten.as_strided:
        return
    operand = cast(fx.Node, node.args[0])
    position: BatchDim | None = operand.meta.get(BATCH_DIM_KEY)
    if position is None or position.is_filler:
        return
    x: Tensor = operand.meta["val"]
    if packet is aten.as_strided:
        found = batch_dim_maybe(node.meta["val"], batch)
        step = None if found is None else _expr(cast(Any, node.args[2])[found[0]])
        is_whole = step == size_expr(x.stride(position.dim)) * position.inner
    else:
        rest = [*node.args[_CUTS[packet] :], *[None] * 4]
        if cast(int, rest[0] or 0) % x.ndim != position.dim:
            return
        is_whole = bool(position.inner == 1)
        if packet is aten.slice:
            start = sympy.cancel(_expr(rest[1] or 0) / batch)
            is_whole = is_whole and start.is_Integer and rest[3] in (None, 1)
            sizes = (node.meta["val"].shape[position.dim], x.shape[position.dim])
            is_whole = is_whole or size_expr(sizes[0]) == size_expr(sizes[1])
    if not is_whole:
        raise ValueError("takes some rows of the samples")


def _expr(size: Any) -> sympy.Expr:
    """Return an argument of a node, a number or the node of one, as an expression."""
    return size_expr(size.meta["val"] if isinstance(size, fx.Node) else size)


def _returns_any_number_of_rows(node: fx.Node) -> bool:
    if getattr(node.target, "overloadpacket", None) is aten.index:
        indices = [index for index in cast(Any, node.args[1]) if index is not None]
        return any(index.meta["val"].dtype == torch.bool for index in indices)
    return torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())


def _counts_samples(index: fx.Node) -> bool:
    """Say whether an index is 0, 1, 2, ..., one for each sample, in whatever shape."""
    while getattr(index.target, "overloadpacket", None) in (*RESHAPES, aten.unsqueeze):
        index = cast(fx.Node, index.args[0])
    position: BatchDim | None = index.meta.get(BATCH_DIM_KEY)
    return position is not None and position.is_plain and _counts_from_zero(index)


def _counts_from_zero(node: fx.Node) -> bool:
    """Say whether a node returns 0, 1, 2, ..."""
    if node.target in (aten.arange.default, torch.ops.prims.iota.default):
        start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
    elif node.target in (aten.arange.start, aten.arange.start_step):
        start, step = node.args[0], node.args[2] if len(node.args) > 2 else 1
    else:
        return False
    return (start, step) == (0, 1)


def operand_dims(node: fx.Node) -> list[BatchDim]:
    """Return where the operands of a node hold the samples; those without samples are left out."""
    found = (operand.meta.get(BATCH_DIM_KEY) for operand in node.all_input_nodes)
    return [position for position in found if position is not None]
