"""Batch dimensions: where each tensor of a graph with a symbolic batch size holds the samples.

The batch size is a symbol s, so a dimension whose size is `s` or `s * m` holds the samples. If m is
above 1, samples were merged with tokens, windows or heads, and the size alone does not tell in
which order. This analysis follows the order through the graph. Of a size outer * s * inner, entry i
belongs to sample `i // inner % s`:

    x.flatten(0, 1)                   [s, 101, C] -> [101 * s, C]    inner = 101
    x.transpose(0, 1).flatten(0, 1)   [s, 101, C] -> [101 * s, C]    inner = 1

It also finds operations that move samples or mix them, such as `x.flip(0)`.

Private torch: the expression behind a SymInt.
"""

import operator
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

__all__ = ["BATCH_DIM_KEY", "BatchDim", "batch_dim_maybe", "find_batch_dims", "size_expr"]

# Key in `node.meta`; the value is the node's `BatchDim`. It survives the partitioner.
BATCH_DIM_KEY = "ssprop_batch_dim"

aten = torch.ops.aten

_RESHAPES = (aten.view, aten._unsafe_view, aten.reshape)

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

# One value everywhere, so the order of the rows does not matter.
_FILLERS = (
    *(aten.full, aten.zeros, aten.ones, aten.empty),
    *(aten.new_full, aten.new_zeros, aten.new_ones, aten.new_empty),
)


@dataclass(frozen=True)
class BatchDim:
    """Where a tensor holds the samples.

    Attributes:
        dim: the dimension.
        inner: entry i of the dimension belongs to sample `i // inner % s`.
        outer: size of the dimension / (s * inner).
        is_filler: whether the tensor has one value everywhere, so that any order is right.
    """

    dim: int
    inner: sympy.Expr
    outer: sympy.Expr
    is_filler: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the dimension is the batch and nothing else."""
        return bool(self.inner == 1 and self.outer == 1)


def size_expr(size: Any) -> sympy.Expr:
    """Return a size, an int or SymInt, as an expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def batch_dim_maybe(x: Tensor, batch: sympy.Symbol) -> tuple[int, sympy.Expr] | None:
    """Return the dimension whose size depends on the batch size, and the size over the batch size.

    Raises:
        ValueError: there are several such dimensions, or the size is no multiple of the batch size.
    """
    sizes = [size_expr(size) for size in x.shape]
    dims = [d for d, size in enumerate(sizes) if batch in size.free_symbols]
    if not dims:
        return None
    if len(dims) > 1:
        raise ValueError("holds the batch in several dimensions")
    size = sizes[dims[0]]
    rows = sympy.cancel(size / batch)
    if batch in rows.free_symbols or rows.as_numer_denom()[1] != 1:
        raise ValueError(f"has {size} rows, which is no multiple of the batch size {batch}")
    return dims[0], rows


def find_batch_dims(graph: fx.Graph, batch: sympy.Symbol) -> dict[fx.Node, str]:
    """Write the `BatchDim` of each node into its metadata, under `BATCH_DIM_KEY`.

    Args:
        graph: a joint graph with fake values.
        batch: the symbol of the batch size.

    Returns:
        For each node that has no known batch dimension although its size depends on the batch, or
        that moves or mixes samples: the reason.
    """
    unknown: dict[fx.Node, str] = {}
    # inner of nodes with several results, which have no dimension of their own.
    shared: dict[fx.Node, sympy.Expr] = {}
    for node in graph.nodes:
        node.meta.pop(BATCH_DIM_KEY, None)
        value = node.meta.get("val")
        try:
            _refuse_mixing(node)
            _refuse_cuts(node, batch)
            if isinstance(value, Tensor):
                found = batch_dim_maybe(value, batch)
                if found is not None:
                    node.meta[BATCH_DIM_KEY] = _of_result(node, *found, batch, shared)
            elif isinstance(value, (tuple, list)):
                inners = {position.inner for position in _of_operands(node)}
                if len(inners) == 1:
                    shared[node] = inners.pop()
        except ValueError as error:
            unknown[node] = f"{node.target} {error}"
    return unknown


def _of_result(
    node: fx.Node,
    dim: int,
    rows: sympy.Expr,
    batch: sympy.Symbol,
    shared: dict[fx.Node, sympy.Expr],
) -> BatchDim:
    if rows == 1:
        return BatchDim(dim, sympy.Integer(1), sympy.Integer(1))
    packet = getattr(node.target, "overloadpacket", None)
    operands = _of_operands(node)
    if packet in _FILLERS or (operands and all(position.is_filler for position in operands)):
        return BatchDim(dim, sympy.Integer(1), rows, is_filler=True)
    if packet in _RESHAPES:
        inner = _reshaped(node, dim, rows)
    elif packet is aten.as_strided_scatter and node.meta["val"].ndim == 1:
        inner = _strided(node, batch)
    elif packet is aten.cat and _along(node) == dim:
        # Each operand has whole rounds of the samples. The backward of `unbind` is such a stack.
        inners = {position.inner for position in operands if not position.is_filler}
        if len(inners) != 1:
            raise ValueError(f"puts samples in different orders together, [{rows * batch}]")
        inner = inners.pop()
    elif node.target is operator.getitem and node.args[0] in shared:
        inner = shared[cast(fx.Node, node.args[0])]
    else:
        rest = (p for p in operands if not p.is_filler)
        inners = {p.inner for p in rest if p.inner * p.outer == rows}
        if len(inners) != 1:
            raise ValueError(f"merges samples with others, [{rows * batch}], in unknown order")
        inner = inners.pop()
    outer = sympy.cancel(rows / inner)
    if outer.as_numer_denom()[1] != 1 or inner.as_numer_denom()[1] != 1:
        raise ValueError(f"splits the rows of a sample, {rows}, in unknown order")
    return BatchDim(dim, inner, outer)


def _along(node: fx.Node) -> int:
    """Return the dimension along which an `aten.cat` joins its operands."""
    dim = cast(int, node.args[1]) if len(node.args) > 1 else 0
    return dim % int(node.meta["val"].ndim)


def _reshaped(node: fx.Node, dim: int, rows: sympy.Expr) -> sympy.Expr:
    """Return `inner` after a reshape, which keeps the order of all entries."""
    operand = cast(fx.Node, node.args[0])
    before: BatchDim | None = operand.meta.get(BATCH_DIM_KEY)
    if before is None:
        raise ValueError("reshapes a tensor whose samples are in unknown order")
    if before.dim == dim == 0 and before.outer == 1:
        # Samples stay outermost. With several symbols no quotient would show it.
        return rows
    entries = before.inner * _product(operand.meta["val"].shape[before.dim + 1 :])
    return sympy.cancel(entries / _product(node.meta["val"].shape[dim + 1 :]))


def _strided(node: fx.Node, batch: sympy.Symbol) -> sympy.Expr:
    """Return `inner` of a flat tensor that a strided view was written into."""
    _base, written, _sizes, strides = cast(Any, node.args[:4])
    found = batch_dim_maybe(written.meta["val"], batch)
    if found is None or found[1] != 1 or not isinstance(strides[found[0]], int):
        raise ValueError("writes samples in unknown order")
    return sympy.Integer(strides[found[0]])


def _refuse_mixing(node: fx.Node) -> None:
    """Raise a ValueError if a node moves samples, or mixes them into other samples."""
    packet = getattr(node.target, "overloadpacket", None)
    if _returns_any_number_of_rows(node) and _of_operands(node):
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


def _refuse_cuts(node: fx.Node, batch: sympy.Symbol) -> None:
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
    while getattr(index.target, "overloadpacket", None) in (*_RESHAPES, aten.unsqueeze):
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


def _of_operands(node: fx.Node) -> list[BatchDim]:
    found = (operand.meta.get(BATCH_DIM_KEY) for operand in node.all_input_nodes)
    return [position for position in found if position is not None]


def _product(sizes: Any) -> sympy.Expr:
    return sympy.Mul(*map(size_expr, sizes))
