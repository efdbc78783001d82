"""BatchDim: where one tensor of a graph with a symbolic batch size holds the samples.

Private torch: the expression behind a SymInt.
"""

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

__all__ = ["BATCH_DIM_KEY", "BatchDim", "batch_dim_maybe", "size_expr"]

# Key in `node.meta`; the value is the node's `BatchDim`. It survives the partitioner.
BATCH_DIM_KEY = "ssprop_batch_dim"


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
