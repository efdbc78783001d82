"""Selectors: which channels, or samples, a sparse backward keeps, given their scores.

A selector is a function `select(scores, k) -> indices` or `-> (indices, weights)` of

    scores   [..., n]; leading dimensions are groups, and selection is separate in each
    k        how many to choose of each n, in [1, n]; an int or a SymInt that is read at run time
    indices  [..., k], int64, all different within a group
    weights  [..., k]; a kept channel is multiplied by its weight

For samples, scores are [N], without groups, k is an int, and the weight of a kept sample multiplies
its gradient of the model's outputs.

Selectors of channels are plain torch that the pass traces: no Python value may depend on a tensor's
values. Every selector here prefers scores that are not finite, so that a `GradScaler` finds them.
Random selectors draw from torch's default generator. They are reproducible under
`torch.manual_seed`, but Inductor and AOT eager draw different numbers.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SELECTORS", "Selector", "random", "sampled", "topk"]

Selector = Callable[[Tensor, int], Tensor | tuple[Tensor, Tensor]]

# `sampled` raises smaller scores to this share of the mean score.
_FLOOR = 1e-3

# An inclusion probability this close below 1 is 1 except for rounding.
_ROUNDING = 1e-6


def topk(scores: Tensor, k: int) -> Tensor:
    """Return the channels with the k largest scores; NaN ranks first, then infinity.

    Args:
        scores: [..., n].
        k: how many to choose.

    Returns:
        Indices, [..., k]; without groups they ascend, so that gathers read memory in order.
    """
    indices = torch.topk(scores, k, sorted=False).indices
    # With groups, Inductor orders the strides of sort's results, which depend on k (torch 2.13).
    return indices.sort().values if indices.ndim == 1 else indices


def random(scores: Tensor, k: int) -> Tensor:
    """Return k random channels; every choice is equally likely.

    This is a baseline: nothing makes up for what it drops. It uses scores only to find channels
    that are not finite.

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

    Channel i is kept with probability p_i = min(1, c s_i) and then weighted by 1 / p_i (Horvitz and
    Thompson, JASA 1952). The factor c makes the p_i add up to k. Channels with p_i = 1 are certain
    winners. Systematic sampling in channel order draws the others (Madow, Ann. Math. Stat. 1949):
    it uses one random number per group, and every draw keeps exactly k channels.

    The stochastic pruning of Ye et al. (ECCV 2020), ported to channels, is this rule with
    independent draws: a score below the threshold 1 / c becomes the threshold with probability p_i,
    else zero. It keeps a random number of channels with mean k, but our keep counts are fixed. This
    is its fixed-size variant, with the same expectation.

    A score below a thousandth of its group's mean is raised to that. Then a score that misjudges a
    channel makes neither its weight unbounded nor the gradient biased.

    Args:
        scores: [..., n], not negative.
        k: how many to choose.

    Returns:
        Indices and weights, [..., k] each.
    """
    n = scores.shape[-1]
    scores = _relative(scores)
    # c is the largest of these quotients. If the j smallest scores were drawn from, and all others
    # were certain, the probabilities would be (j - n + k) s_i / (sum of the j scores).
    wanted = torch.arange(1, n + 1, device=scores.device) + (k - n)
    c = (wanted / scores.sort(-1).values.cumsum(-1)).amax(-1, keepdim=True)
    p = c * scores
    is_certain = (p > 1 - _ROUNDING) | scores.isinf()
    p = torch.where(is_certain, 1.0, p)
    # Intervals of length p follow one another from 0. A channel is drawn if its interval holds a
    # point u + integer.
    ends = torch.where(is_certain, 0.0, p).cumsum(-1)
    below = (ends + torch.rand_like(ends[..., :1])).floor()
    is_drawn = torch.diff(below, dim=-1, prepend=torch.zeros_like(below[..., :1]))
    # topk makes their number k even if rounding moves the last end across a point.
    indices = topk(torch.where(is_certain, 2.0, is_drawn + p / 2), k)
    return indices, p.gather(-1, indices).reciprocal()


SELECTORS: dict[str, Selector] = {"topk": topk, "random": random, "sampled": sampled}


def _relative(scores: Tensor) -> Tensor:
    """Return scores divided by their group's mean, at least `_FLOOR`; infinite if not finite."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    is_finite = scores.isfinite()
    finite = torch.where(is_finite, scores, 0.0)
    mean = finite.mean(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.where(is_finite, (finite / mean).clamp(min=_FLOOR), math.inf)
