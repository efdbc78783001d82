"""Telemetry: what a sparse backward reports about its selection, to schedulers and people.

A site reports three numbers. g is the gradient that channels are chosen from, and s is the kept
part of it (weighted, if the selector weights channels):

    kept_mass   sum of the scores of the kept channels / sum of all scores
    error       |g - s|^2 / |g|^2
    grad_norm   |g|

Without weights, `error` is the share of the squared norm that is left out. For an unbiased
selector, its expectation is the added variance, as a share of the squared norm. At the end of the
backward the graph writes the numbers into one tensor, float32 [slots, 3], one row per slot. The
graph does not read that tensor, and nothing waits for the write.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ssprop_passes.selection.scores import sum_by_channel

__all__ = ["FIELDS", "observe", "write_rows"]

FIELDS = ("kept_mass", "error", "grad_norm")


def observe(grad_output: Tensor, scores: Tensor, indices: Tensor, weights: Tensor | None) -> Tensor:
    """Return a site's row of the telemetry table.

    Args:
        grad_output: [N, C, *space].
        scores: [C].
        indices: kept channels, [k].
        weights: factor of each kept channel, [k]; None if all are 1.

    Returns:
        The values of `FIELDS`, float32 [3]. They are not finite if the gradient is not. If the
        gradient is all zero, nothing counts as lost.
    """
    # A half-precision sum of squares would overflow.
    squares = sum_by_channel(grad_output.to(torch.float32).square(), torch.float32)
    scores = scores.to(torch.float32)
    if weights is None:
        left = squares.index_fill(0, indices, 0.0)
    else:
        shares = (1 - weights).to(torch.float32).square()
        left = squares.index_put([indices], squares[indices] * shares)
    total = squares.sum()
    mass = _ratio(scores[indices].sum(), scores.sum(), of_nothing=1.0)
    return torch.stack([mass, _ratio(left.sum(), total, of_nothing=0.0), total.sqrt()])


def write_rows(table: Tensor, rows: Sequence[Tensor], slots: Mapping[int, int]) -> None:
    """Write the rows of a graph's sites; all other rows become NaN.

    Args:
        table: float32 [slots, 3].
        rows: the rows that `observe` returned.
        slots: slot -> its index in `rows`.
    """
    none = table.new_full((len(FIELDS),), float("nan"))
    every = [rows[slots[i]].to(table.device) if i in slots else none for i in range(len(table))]
    table.copy_(torch.stack(every))


def _ratio(part: Tensor, whole: Tensor, of_nothing: float) -> Tensor:
    return torch.where(whole == 0, of_nothing, part / whole)
