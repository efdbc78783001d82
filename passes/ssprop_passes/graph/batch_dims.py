"""Batch dimensions: where each tensor of a graph with a symbolic batch size holds the samples.

The batch size is a symbol s, so a dimension whose size is `s` or `s * m` holds the samples. If m is
above 1, samples were merged with tokens, windows or heads, and the size alone does not tell in
which order. This analysis follows the order through the graph. Of a size outer * s * inner, entry i
belongs to sample `i // inner % s`:

    x.flatten(0, 1)                   [s, 101, C] -> [101 * s, C]    inner = 101
    x.transpose(0, 1).flatten(0, 1)   [s, 101, C] -> [101 * s, C]    inner = 1

Operations that move samples or mix them (`graph/mixed_samples.py`) have no such order.
"""

import operator
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from ssprop_passes.graph.batch_dim import BATCH_DIM_KEY, BatchDim, batch_dim_maybe, size_expr
from ssprop_passes.graph.mixed_samples import RESHAPES, operand_dims, refuse_cuts, refuse_mixing

__all__ = ["find_batch_dims"]

aten = torch.ops.aten

# One value everywhere, so the order of the rows does not matter.
_FILLERS = (
    *(aten.full, aten.zeros, aten.ones, aten.empty),
    *(aten.new_full, aten.new_zeros, aten.new_ones, aten.new_empty),
)


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
            refuse_mixing(node)
            refuse_cuts(node, batch)
            if isinstance(value, Tensor):
                found = batch_dim_maybe(value, batch)
                if found is not None:
                    node.meta[BATCH_DIM_KEY] = _of_result(node, *found, batch, shared)
            elif isinstance(value, (tuple, list)):
                inners = {position.inner for position in operand_dims(node)}
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
    operands = operand_dims(node)
    if packet in _FILLERS or (operands and all(position.is_filler for position in operands)):
        return BatchDim(dim, sympy.Integer(1), rows, is_filler=True)
    if packet in RESHAPES:
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


def _product(sizes: Any) -> sympy.Expr:
    return sympy.Mul(*map(size_expr, sizes))
