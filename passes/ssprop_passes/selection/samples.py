"""Samples, the other axis: which samples of the batch a backward is made of.

The choice is made once, when a backward begins, from the gradients of the model's outputs. Then
`ssprop_passes.transforms.sliced_backward` runs every node of the backward on the kept samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.selectors import SELECTORS

__all__ = [
    "choose_samples",
    "reaches_others",
    "sample_factors",
    "sample_scores",
    "scatter_samples",
    "split_samples",
    "weigh_samples",
]


def sample_scores(selection: Selection, gradients: Sequence[Tensor]) -> Tensor:
    """Return the score of each sample, [N].

    Args:
        selection: how samples are chosen. Its score gets one column for each sample, [D, N], and in
            place of a weight the same numbers as rows, [N, D].
        gradients: gradients of the outputs, [N, ...] each; together D numbers a sample.

    Raises:
        ValueError: a custom score returns a result of the wrong form.
    """
    wide = torch.float32
    for gradient in gradients:
        wide = torch.promote_types(wide, gradient.dtype)
    by_sample = torch.cat([g.reshape(g.shape[0], -1).to(wide) for g in gradients], 1)
    return selection.scores_of(by_sample.t(), by_sample)


def choose_samples(selection: Selection, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """Return the kept samples and their weights; the weights are None if all are 1.

    Args:
        selection: how samples are chosen.
        scores: [N].
        k: keep count, in [1, N].

    Returns:
        Indices into the N samples, ascending, int64 [k]; weights, [k].

    Raises:
        ValueError: a custom selector returns a result of the wrong form.
    """
    indices, weights = selection.choose(scores, k)
    is_own = selection.select not in SELECTORS.values()
    if is_own and len(set(indices.tolist())) < k:
        raise ValueError(f"select must return indices that are all different, got {indices}")
    order = indices.argsort()
    return indices[order], None if weights is None else weights[order]


def sample_factors(indices: Tensor, weights: Tensor | None, size: int) -> Tensor:
    """Return what each sample's gradient is multiplied by: its weight if it is kept, else 0.

    Args:
        indices: the kept samples, int64 [k].
        weights: their weights, [k]; None if all are 1.
        size: samples in the batch, N.

    Returns:
        Factors, [N].
    """
    values = torch.ones(indices.shape, device=indices.device) if weights is None else weights
    return values.new_zeros(size).index_copy(0, indices, values)


def split_samples(x: Tensor, size: int, dim: int, inner: int = 1) -> Tensor:
    """Return a tensor with a dimension for the samples alone, at `dim + 1`.

    Args:
        x: any shape. Entry i of dimension `dim` belongs to sample `i // inner % size`.
        size: number of samples.
        dim: the dimension.
        inner: see above.

    Returns:
        The shape of `x` with the sizes (outer, size, inner) in place of dimension `dim`.
    """
    return x.reshape(*x.shape[:dim], -1, size, inner, *x.shape[dim + 1 :])


def weigh_samples(gradient: Tensor, factors: Tensor, dim: int, inner: int = 1) -> Tensor:
    """Return a gradient with every sample multiplied by its factor, in the gradient's dtype.

    A sample with the factor 0 becomes 0 even if it is not finite.

    Args:
        gradient: any shape, with N samples as `split_samples` describes.
        factors: [N].
        dim: the dimension that has the samples.
        inner: see `split_samples`.
    """
    split = split_samples(gradient, len(factors), dim, inner)
    shape = [1] * split.ndim
    shape[dim + 1] = -1
    factors = factors.view(shape)
    weighed = torch.where(factors == 0, 0, split * factors.to(gradient.dtype))
    return weighed.to(gradient.dtype).reshape(gradient.shape)


def reaches_others(gradient: Tensor, indices: Tensor, size: int, dim: int, inner: int = 1) -> bool:
    """Say whether a gradient is not zero for a sample that is left out.

    Args:
        gradient: any shape, with N samples as `split_samples` describes.
        indices: the kept samples, int64 [k].
        size: samples in the batch, N.
        dim: the dimension that has the samples.
        inner: see `split_samples`.
    """
    others = torch.ones(size, dtype=torch.bool, device=indices.device)
    others[indices] = False
    rows = split_samples(gradient, size, dim, inner).movedim(dim + 1, 0)[others]
    # Not NaN: code between graphs may make it of a zero gradient.
    return bool((rows.abs() > 0).any())


def scatter_samples(rows: Tensor, indices: Tensor, size: int, dim: int, inner: int = 1) -> Tensor:
    """Return zeros for the whole batch, with the kept samples at their places.

    Args:
        rows: any shape, with k samples as `split_samples` describes.
        indices: the kept samples, int64 [k].
        size: samples in the batch, N.
        dim: the dimension that has the samples.
        inner: see `split_samples`.

    Returns:
        The shape of `rows` with N in place of k.
    """
    split = split_samples(rows, len(indices), dim, inner)
    whole = split.new_zeros(*split.shape[: dim + 1], size, *split.shape[dim + 2 :])
    scattered: Tensor = whole.index_copy_(dim + 1, indices, split).flatten(dim, dim + 2)
    return scattered
