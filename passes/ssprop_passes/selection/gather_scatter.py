"""Gather channels or rows of a tensor, scatter them back, and keep its memory format.

These are plain torch functions that the pass traces. The number of indices may be an int or a
SymInt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssprop_passes.kernels import operators
from ssprop_passes.selection.scores import all_but

__all__ = [
    "add_channels",
    "dims_order",
    "gather_channels",
    "gather_weight",
    "is_channels_last",
    "scale_channels",
    "scatter_rows",
    "sum_channels",
    "with_order",
]


def sum_channels(grad_output: Tensor, dim: int = 1) -> Tensor:
    """Return the sum of each channel, [C]: the gradient of a bias."""
    return grad_output.sum(all_but(grad_output, dim))


def gather_channels(x: Tensor, indices: Tensor) -> Tensor:
    """Return `x[:, indices]`, [N, k, *space], in the memory format of `x`, [N, C, *space]."""
    if is_channels_last(x):
        # Indexing dimension 1 directly yields a contiguous tensor when the number of indices is
        # only known at run time, and convolutions on it are two to three times slower.
        return x.permute(_last(x))[..., indices].permute(_first(x))
    return x[:, indices]


def scale_channels(x: Tensor, weights: Tensor) -> Tensor:
    """Return each channel of `x`, [N, k, *space], times its weight, [k], in the dtype of `x`."""
    return x * weights.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


def gather_weight(rows: Tensor, indices: Tensor) -> Tensor:
    """Return `rows[indices]`, [k, ...], in the memory format of a weight's `rows`, [C, ...]."""
    kept: Tensor = operators.gather_weight(rows, indices, is_channels_last(rows))
    return kept


def scatter_rows(rows: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Return zeros in the shape of `like`, [C, ...], with `rows`, [k, ...], at `indices`."""
    full: Tensor = operators.scatter_rows(rows, indices, like.shape[0], is_channels_last(like))
    return full


def add_channels(channels: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Return zeros in the shape of `like`, [N, C, *space], with `channels` added at `indices`.

    Args:
        channels: [N, k, *space].
        indices: [k], may repeat.
        like: [N, C, *space].
    """
    return torch.zeros_like(like).index_add(1, indices, channels)


def dims_order(x: Tensor) -> list[int]:
    """Return the dimensions of a tensor from the outermost to the innermost in memory."""
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda d: -strides[d])


def with_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """Return `x` dense with its dimensions laid out in this order; `x` itself if it is so already.

    The order replaces strides because strides may be symbolic. If the tensor is not an input of
    the trace, its symbolic strides have no node in the trace, which cannot compare them.
    """
    permuted = x.permute(*order)
    if permuted.is_contiguous():
        return x
    inverse = [list(order).index(d) for d in range(x.ndim)]
    return permuted.clone(memory_format=torch.contiguous_format).permute(inverse)


def is_channels_last(x: Tensor) -> bool:
    """Say whether a tensor is channels last; False if its space is a single point.

    A single point has no layout, and to find one torch would need the unbacked channel count.
    """
    if x.ndim not in (4, 5) or all(size == 1 for size in x.shape[2:]):
        return False
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=layout) and not x.is_contiguous()


def _last(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim), 1]


def _first(x: Tensor) -> list[int]:
    return [0, x.ndim - 1, *range(1, x.ndim - 1)]
