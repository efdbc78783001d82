"""What every sparse backward shares: score the channels, select, gather, scatter.

Plain torch functions: at once the reference and what the pass traces. The keep count k may be an
int or a SymInt that is read at run time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "add_channels",
    "channel_scores",
    "gather_channels",
    "is_channels_last",
    "scatter_rows",
    "select_channels",
    "sum_channels",
    "with_strides",
]


def channel_scores(grad_output: Tensor, dim: int = 1) -> Tensor:
    """Return the mean magnitude of each channel, the score of ssProp (arXiv 2408.12561).

    Args:
        grad_output: any shape, with C channels in dimension `dim`.
        dim: the channel dimension.

    Returns:
        Scores, [C].
    """
    return grad_output.abs().mean(_all_but(grad_output, dim))


def sum_channels(grad_output: Tensor, dim: int = 1) -> Tensor:
    """Return the sum of each channel, [C]: the gradient of a bias."""
    return grad_output.sum(_all_but(grad_output, dim))


def select_channels(scores: Tensor, k: int, groups: int = 1) -> Tensor:
    """Return the channels of the k largest scores of each group.

    Args:
        scores: [C], the groups one after another.
        k: keep count of each group, in [1, C / groups].
        groups: number of groups.

    Returns:
        Indices into the C channels, int64 [groups * k], grouped.
    """
    if groups == 1:
        return torch.topk(scores, k, sorted=False).indices
    per_group = scores.shape[0] // groups
    local = torch.topk(scores.view(groups, per_group), k, sorted=False).indices
    offsets = torch.arange(0, scores.shape[0], per_group, device=scores.device)
    return (local + offsets[:, None]).flatten()


def gather_channels(x: Tensor, indices: Tensor) -> Tensor:
    """Return `x[:, indices]`, [N, k, *space], in the memory format of `x`, [N, C, *space]."""
    if is_channels_last(x):
        # Indexing dimension 1 directly yields a contiguous tensor when the number of indices is
        # only known at run time, and convolutions on it are two to three times slower.
        return x.permute(_last(x))[..., indices].permute(_first(x))
    return x[:, indices]


def scatter_rows(rows: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Return zeros of the shape of `like`, [C, ...], but for `rows`, [k, ...], at `indices`."""
    return torch.zeros_like(like).index_put([indices], rows)


def add_channels(channels: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Return zeros of the shape of `like`, [N, C, *space], with `channels` added at `indices`.

    Args:
        channels: [N, k, *space].
        indices: [k], may repeat.
        like: [N, C, *space].
    """
    return torch.zeros_like(like).index_add(1, indices, channels)


def with_strides(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Return `x` with its dimensions laid out in the order of `strides`; itself if it has these."""
    if tuple(x.stride()) == tuple(strides):
        return x
    order = sorted(range(x.ndim), key=lambda d: -strides[d])
    inverse = [order.index(d) for d in range(x.ndim)]
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


def is_channels_last(x: Tensor) -> bool:
    """Say whether a tensor lies channels last; never where its space is a single point.

    A single point has no layout, and torch asks the unbacked channel count for one.
    """
    if x.ndim not in (4, 5) or all(size == 1 for size in x.shape[2:]):
        return False
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=layout) and not x.is_contiguous()


def _all_but(x: Tensor, dim: int) -> list[int]:
    return [d for d in range(x.ndim) if d != dim % x.ndim]


def _last(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim), 1]


def _first(x: Tensor) -> list[int]:
    return [0, x.ndim - 1, *range(1, x.ndim - 1)]
