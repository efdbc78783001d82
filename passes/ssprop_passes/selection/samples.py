"""Samples, the other axis: a backward from some samples of the batch and all channels.

    before    dx, dw = backward(dy, x, w)

    after     dx_k, dw = backward(dy[idx], x[idx], w)
              dx = zeros.index_put([idx], dx_k)

The samples are chosen once per backward, by the gradient of the site nearest the loss. Every other
site of the graph keeps the same samples. A kept sample therefore adds its full share to the
gradients, at all depths and along all paths, if the layers in between treat each sample separately.
Layer norm does. Batch norm in training does not: only the kept samples add to the gradients of its
statistics, which then flow to the other samples, until the next site drops them. Paths around all
sites, such as a residual connection, carry the gradient of every sample.

The weights of a selector, 1 / p, multiply a sample's share of the weight and bias gradients. They
do not multiply the input gradient, because they would compound from site to site. So the expected
weight gradient of every site is the dense one, if samples are not coupled.
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
        indices: the samples' rows of the leading dimension, int64 [k * m].
        weights: factor of each row's share of the weight gradient, [k * m]; None if all are 1.
    """

    indices: Tensor
    weights: Tensor | None = None

    @classmethod
    def of_rows(cls, indices: Tensor, weights: Tensor | None, rows: int) -> "Samples":
        """Return samples that each take `rows`, m, consecutive rows of a leading dimension.

        Args:
            indices: samples of the batch, int64 [k].
            weights: the samples' weights, [k], or None.
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
        """Return zeros in the shape of `like`, [N, *rest], with `rows` at the kept rows."""
        return torch.zeros_like(like).index_put([self.indices], rows)


def choose_samples(
    selection: Selection, grad_output: Tensor, input: Tensor, k: int, rows: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Return the kept samples and their weights; the weights are None if all are 1.

    Args:
        selection: how samples are chosen. Its score gets the samples in place of channels, and the
            samples of the layer's input in place of the weight's rows.
        grad_output: [N * m, C, *space].
        input: [N * m, C_in, *space].
        k: keep count, in [1, N]; may be a SymInt.
        rows: rows per sample, m.

    Returns:
        Indices into the N samples, int64 [k]; weights, [k].

    Raises:
        ValueError: a custom score or selector returns a result of the wrong form.
    """
    by_sample = _split(grad_output, rows).transpose(0, 1)
    scores = selection.score(by_sample, _split(input, rows))
    selection.check_scores(scores, by_sample.shape[1])
    return selection.choose(scores, k)


def _split(x: Tensor, rows: int) -> Tensor:
    """Return `x`, [N * m, *rest], as [N, m, *rest]."""
    return x.unsqueeze(1) if rows == 1 else x.reshape(-1, rows, *x.shape[1:])
