"""Samples: the other axis. A backward from some samples of the batch, of all channels.

    before    dx, dw = backward(dy, x, w)

    after     dx_k, dw = backward(dy[idx], x[idx], w)
              dx = zeros.index_put([idx], dx_k)

The samples are chosen once in a backward, by the gradient of the site nearest the loss, and every
other site of the graph keeps the same. So what a kept sample adds to the gradients is whole, at
all depths and along all paths, as far as the layers between treat each sample by itself. Layer
norm does; batch norm in training does not: the gradients of its statistics are then those of the
kept samples alone, and reach the others, for whom the next site drops them. Paths past all sites,
such as a residual connection, carry the gradient of every sample.

Weights of a selector, 1 / p, multiply what a sample adds to the gradients of weight and bias, and
not the gradient of the input: from one site to the next they would multiply one another. So the
expected gradient of every site's weight is the dense one where samples are not coupled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssprop_passes.selection.gather_scatter import gather_rows
from ssprop_passes.selection.policy import Selection

__all__ = ["Samples", "choose_samples"]


@dataclass(frozen=True)
class Samples:
    """The samples that a site keeps.

    Attributes:
        indices: their rows of the leading dimension, int64 [k * m].
        weights: what each row's share of the weight's gradient is multiplied by, [k * m]; None
            where all are 1.
    """

    indices: Tensor
    weights: Tensor | None = None

    @classmethod
    def of_rows(cls, indices: Tensor, weights: Tensor | None, rows: int) -> "Samples":
        """Return samples that take `rows` rows each, m, one after another, of a leading dimension.

        Args:
            indices: samples of the batch, int64 [k].
            weights: theirs, [k], or None.
            rows: m, such as the length of a sequence.
        """
        if rows > 1:
            within = torch.arange(rows, device=indices.device)
            indices = (indices[:, None] * rows + within).flatten()
            weights = None if weights is None else weights.repeat_interleave(rows)
        return cls(indices, weights)

    def gather(self, x: Tensor) -> Tensor:
        """Return the kept rows of `x`, [N, *rest], in its memory format."""
        return gather_rows(x, self.indices)

    def weighted(self, rows: Tensor) -> Tensor:
        """Return kept rows, [k * m, *rest], times their weights, in their dtype."""
        if self.weights is None:
            return rows
        return rows * self.weights.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))

    def scatter(self, rows: Tensor, like: Tensor) -> Tensor:
        """Return zeros of the shape of `like`, [N, *rest], but for the kept rows."""
        return torch.zeros_like(like).index_put([self.indices], rows)


def choose_samples(
    selection: Selection, grad_output: Tensor, input: Tensor, k: int, rows: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Return the samples that are kept, and their weights, None where all are 1.

    Args:
        selection: its score is given the samples as what it calls channels, and the samples of
            the layer's input as the rows of the weight.
        grad_output: [N * m, C, *space].
        input: [N * m, C_in, *space].
        k: keep count, in [1, N]; may be a SymInt.
        rows: rows of a sample, m.

    Returns:
        Indices into the N samples, int64 [k]; weights, [k].

    Raises:
        ValueError: a score or selector of the user's returns what is none.
    """
    by_sample = _split(grad_output, rows).transpose(0, 1)
    scores = selection.score(by_sample, _split(input, rows))
    selection.check_scores(scores, by_sample.shape[1])
    return selection.choose(scores, k)


def _split(x: Tensor, rows: int) -> Tensor:
    """Return `x`, [N * m, *rest], as [N, m, *rest]."""
    return x.unsqueeze(1) if rows == 1 else x.reshape(-1, rows, *x.shape[1:])
