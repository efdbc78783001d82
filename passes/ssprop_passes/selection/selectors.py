"""Selectors: which channels, or samples, a sparse backward keeps, given their scores.

A selector is a function `select(scores, k) -> indices` or `-> (indices, weights)` of

    scores   [..., n]; leading dimensions are groups, each selected from by itself
    k        how many to choose of each n, in [1, n]; an int or a SymInt that is read at run time
    indices  [..., k], int64, all different within a group
    weights  [..., k]; what is kept of a channel is multiplied by its weight

in plain torch, which the pass traces: no Python value may depend on what a tensor holds. Every
selector here keeps channels whose score is not finite before all others, so that a `GradScaler`
finds them. Random ones draw from torch's default generator: reproducible under
`torch.manual_seed`, with other numbers under Inductor than under AOT eager.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SELECTORS", "Selector", "random", "sampled", "topk"]

Selector = Callable[[Tensor, int], Tensor | tuple[Tensor, Tensor]]

# Smallest score that `sampled` takes a channel to have, as a share of the mean score.
_FLOOR = 1e-3

# Inclusion probabilities this close below 1 are 1 but for rounding.
_ROUNDING = 1e-6


def topk(scores: Tensor, k: int) -> Tensor:
    """Return the channels of the k largest scores; NaN counts as the largest, then infinity.

    Args:
        scores: [..., n].
        k: how many to choose.

    Returns:
        Indices, [..., k]; without groups ascending, so that gathers walk through memory in order.
    """
    indices = torch.topk(scores, k, sorted=False).indices
    # With groups Inductor orders the strides of what sort returns, which depend on k (torch 2.13).
    return indices.sort().values if indices.ndim == 1 else indices


def random(scores: Tensor, k: int) -> Tensor:
    """Return k channels at random, each choice as likely as any other.

    A baseline: what it drops is not made up for. Scores only tell which channels are not finite.

    Args:
        scores: [..., n].
        k: how many to choose.

    Returns:
        Indices, [..., k].
    """
    order = torch.rand_like(scores, dtype=torch.float32)
    return topk(torch.where(scores.isfinite(), order, math.inf), k)


def sampled(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return k channels drawn so that the expected gradients are the dense ones.

    Channel i is kept with probability p_i = min(1, c s_i), c being such that the p_i add up to k,
    and then weighted 1 / p_i (Horvitz and Thompson, JASA 1952). Where p_i = 1 it is a certain
    winner; the others are drawn by systematic sampling in channel order (Madow, Ann. Math. Stat.
    1949): one random number for each group, of which exactly k channels are kept in every draw.

    The stochastic pruning of Ye et al. (ECCV 2020), ported to channels, is this rule with
    independent draws: what is below the threshold 1 / c is rounded up to it with probability p_i,
    else to zero. The number kept is then random with mean k, which a fixed keep count excludes;
    this is its variant of fixed size, of the same expectation.

    Scores below a thousandth of their group's mean count as that: a score that misjudges a channel
    cannot make its weight unbounded, nor the gradient biased.

    Args:
        scores: [..., n], not negative.
        k: how many to choose.

    Returns:
        Indices and weights, [..., k] each.
    """
    n = scores.shape[-1]
    scores = _relative(scores)
    # The largest of these quotients is c: drawn from the j smallest scores alone, with all others
    # certain, the probabilities would be (j - n + k) s_i / (their sum).
    wanted = torch.arange(1, n + 1, device=scores.device) + (k - n)
    c = (wanted / scores.sort(-1).values.cumsum(-1)).amax(-1, keepdim=True)
    p = c * scores
    is_certain = (p > 1 - _ROUNDING) | scores.isinf()
    p = torch.where(is_certain, 1.0, p)
    # Channels whose interval, of length p, of the line from 0 to the sum holds a point u + integer.
    ends = torch.where(is_certain, 0.0, p).cumsum(-1)
    below = (ends + torch.rand_like(ends[..., :1])).floor()
    is_drawn = torch.diff(below, dim=-1, prepend=torch.zeros_like(below[..., :1]))
    # With topk their number is k even where rounding moves the last end across a point.
    indices = topk(torch.where(is_certain, 2.0, is_drawn + p / 2), k)
    return indices, p.gather(-1, indices).reciprocal()


SELECTORS: dict[str, Selector] = {"topk": topk, "random": random, "sampled": sampled}


def _relative(scores: Tensor) -> Tensor:
    """Return scores over their group's mean, at least `_FLOOR`; infinite if not finite."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    is_finite = scores.isfinite()
    finite = torch.where(is_finite, scores, 0.0)
    mean = finite.mean(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.where(is_finite, (finite / mean).clamp(min=_FLOOR), math.inf)
