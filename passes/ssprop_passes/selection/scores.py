"""Scores: how much each output channel of a layer matters to its gradients.

A score is a function `score(grad_output, weight) -> scores` of

    grad_output  [N, C, *space]; for a linear layer [T, C]
    weight       [C, ...], one row per output channel for every kind of layer
    scores       [C]; NaN or infinite for a channel that holds such a value, so that selectors
                 keep it and a `GradScaler` finds it

When samples are chosen (`ssprop_passes.selection.samples`), samples take the place of channels:

    grad_output  [D, N]: column i is the gradient of the model's outputs for sample i, D numbers
    weight       [N, D]: the same numbers as rows
    scores       [N]

Scores of channels are plain torch that the pass traces: no Python value may depend on a tensor's
values.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "SCORES",
    "Score",
    "all_but",
    "l2",
    "l2_weight",
    "mean_abs",
    "power_over_ranks",
    "sum_by_channel",
]

# Rows per part: 64 KiB with 256 float32 channels.
_ROWS = 64

Score = Callable[[Tensor, Tensor], Tensor]


def mean_abs(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Return the mean magnitude of each channel, the score of ssProp (arXiv 2408.12561).

    Args:
        grad_output: [N, C, *space].
        weight: [C, ...], not used.

    Returns:
        Scores, [C], at least float32.
    """
    # In half precision the mean of a few large values among many would vanish.
    total = sum_by_channel(grad_output.abs(), _wide(grad_output))
    return total / (grad_output.numel() // grad_output.shape[1])


def l2(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Return the l2 norm of each channel.

    Sampling channels with probability proportional to it adds the least variance to the weight
    gradient, if the layer's inputs have similar norms.

    Args:
        grad_output: [N, C, *space].
        weight: [C, ...], not used.

    Returns:
        Scores, [C], at least float32.
    """
    # A half-precision norm of many values would overflow.
    squares = grad_output.to(_wide(grad_output)).square()
    return sum_by_channel(squares, squares.dtype).sqrt()


def l2_weight(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Return the l2 norm of each channel times the norm of its weight row.

    This is how much a channel matters to the input gradient, the sum over channels of the channel's
    gradient times its row.

    Args:
        grad_output: [N, C, *space].
        weight: [C, ...].

    Returns:
        Scores, [C], at least float32.
    """
    dims = all_but(weight, 0)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dims, dtype=_wide(weight))
    return l2(grad_output, weight) * norms


SCORES: dict[str, Score] = {"mean_abs": mean_abs, "l2": l2, "l2_weight": l2_weight}


def power_over_ranks(score: Score) -> int:
    """Return the exponent of the power mean that turns the ranks' scores into the whole batch's.

    It is 2 for l2 norms, else 1, the plain mean. This is right for a custom score that is itself a
    mean over samples.
    """
    return 2 if score in (l2, l2_weight) else 1


def sum_by_channel(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over all dimensions except 1, in two steps on a CPU.

    For one step Inductor makes the channel loop the outer one, and walks through the whole tensor
    for every 16 channels. In two steps, the sums over a part of the rows read it in memory order.

    Args:
        x: [N, C, *space].
        dtype: dtype of the sums.

    Returns:
        Sums, [C].
    """
    if x.device.type == "cpu" and x.ndim > 2:
        return x.sum(list(range(2, x.ndim)), dtype=dtype).sum(0)
    if x.device.type == "cpu" and isinstance(x.shape[0], int):
        rows = math.gcd(x.shape[0], _ROWS)
        return x.reshape(x.shape[0] // rows, rows, x.shape[1]).sum(1, dtype=dtype).sum(0)
    return x.sum(all_but(x, 1), dtype=dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def all_but(x: Tensor, dim: int) -> list[int]:
    """Return all dimensions of a tensor except one."""
    return [d for d in range(x.ndim) if d != dim % x.ndim]
