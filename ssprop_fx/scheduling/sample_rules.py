"""Sample rules: how many samples a backward keeps, decided in each step by that step's gradients.

A rule is a pure function of the samples' scores s_1 ... s_N, the l2 norms of their gradients of the
model's outputs. Early in training all samples have a gradient, late few do; a rule follows.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from ssprop_passes.selection.selectors import Selector, sampled
from torch import Tensor

from ssprop_fx.scheduling.base import check_budget, check_number

__all__ = [
    "AddedNoise",
    "KeptSamples",
    "SampleRule",
    "SampleTelemetry",
    "default_rule",
    "sample_count",
]

# Keep counts are multiples of a 16th of the batch, rounded up: oneDNN and cuDNN prepare a kernel
# for each new size.
_LEVELS = 16


@dataclass(frozen=True)
class SampleTelemetry:
    """What one backward kept of its batch.

    Attributes:
        kept: samples that it kept, k.
        size: samples in the batch, N.
        kept_mass: share of the sum of all scores that the kept samples hold.
        error: squared norm of what the choice leaves out or adds by weights, as a share of the sum
            of the squared scores. Its mean over steps is the added noise of an unbiased selector.
    """

    kept: int
    size: int
    kept_mass: float
    error: float

    @property
    def drop_rate(self) -> float:
        """The share of the samples that was left out."""
        return 1 - self.kept / self.size


class SampleRule(ABC):
    """Decides how many samples of a batch a backward keeps.

    Attributes:
        budget: largest share of the samples that a backward may keep, in (0, 1]; None for no bound.
    """

    budget: float | None

    @property
    def select(self) -> Selector | None:
        """How the samples are chosen; None leaves that to `SparsityConfig.select`."""
        return None

    @abstractmethod
    def samples_wanted(self, scores: Tensor) -> Tensor:
        """Return how many samples to keep: a tensor of one number, which is rounded up.

        What it returns does not matter if a score is not finite or negative, or if all are zero.

        Args:
            scores: float64 [N].
        """


def sample_count(rule: SampleRule, scores: Tensor) -> int:
    """Return a rule's keep count for a batch; on a GPU this waits for the scores.

    Batches with a score that is not finite are kept whole, so that a gradient scaler finds it.

    Args:
        rule: the rule.
        scores: [N].

    Returns:
        The keep count, in [1, N]: N / 16 or a multiple of it if N is above 16.

    Raises:
        ValueError: a score is negative.

    Examples:
        >>> import torch
        >>> from ssprop_fx import KeptMass
        >>> sample_count(KeptMass(0.9), torch.tensor([8.0, 0.1, 1.0, 0.1]))
        2
    """
    size = scores.shape[0]
    scores = scores.double()
    # One copy, so that a GPU is waited for once.
    numbers = torch.stack([scores.sum(), scores.min(), rule.samples_wanted(scores).double()])
    total, smallest, wanted = numbers.tolist()
    if not math.isfinite(total):
        return size
    if smallest < 0:
        raise ValueError(f"score must not be negative with a rule, got {smallest:g}")
    wanted = wanted if total > 0 else 1.0
    step = max(size // _LEVELS, 1)
    # Rounded first: 2.0000000001 samples are 2.
    count = math.ceil(max(round(wanted, 6), 1.0) / step) * step
    if rule.budget is not None:
        count = min(count, max(int(round(rule.budget * size, 9)), 1))
    return min(count, size)


@dataclass(frozen=True, eq=False)
class KeptSamples:
    """The samples that a backward was made of.

    Attributes:
        scores: [N].
        indices: the kept samples, [k].
        weights: their weights, [k]; None if all are 1.
    """

    scores: Tensor
    indices: Tensor
    weights: Tensor | None

    def telemetry(self) -> SampleTelemetry:
        """Return what was kept; this waits for a GPU."""
        s = self.scores.double()
        kept, square = s[self.indices], s.square().sum()
        if self.weights is None:
            error = square - kept.square().sum()
        else:
            # Each sample stands for 1 / p_i like it, and a draw adds s_i^2 (1 / p_i - 1).
            error = (kept.square() * self.weights * (self.weights - 1)).sum()
        share, noise = kept.sum() / s.sum(), error / square
        return SampleTelemetry(len(kept), len(s), float(share), float(noise))


@dataclass(frozen=True)
class AddedNoise(SampleRule):
    """Draws samples without bias, as few as a bound on the added noise allows.

    Sample i is kept with probability p_i = min(1, c s_i), and its gradient is then multiplied by
    1 / p_i. Independent draws add the variance sum s_i^2 (1 / p_i - 1) to the gradient of a batch,
    in the norm in which the s_i are measured. The rule takes the smallest number of samples, sum
    p_i, for which that is at most `target` times sum s_i^2, the noise that the batch has by itself.
    Samples are drawn systematically (`select="sampled"`), which fixes their number. VCAS (Wang et
    al., ICLR 2024) bounds the same variance, with an estimate from additional backwards.

    Args:
        target: largest added noise, as a share of the batch's own; above 0.
        budget: largest share of the samples that a backward may keep, in (0, 1]. It goes before
            the target. None for no bound.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.

    Examples:
        >>> from ssprop_fx import SparsityScheduler
        >>> SparsityScheduler(controller=AddedNoise(0.1)).controller
        AddedNoise(target=0.1, budget=None)
        >>> import torch
        >>> [sample_count(AddedNoise(target), torch.ones(13)) for target in (0.3, 1.0)]
        [10, 7]
    """

    target: float
    budget: float | None = None

    def __post_init__(self) -> None:
        check_number("target", self.target)
        check_budget(self.budget)
        if not 0 < self.target < math.inf:
            raise ValueError(f"target must be above 0 and finite, got {self.target!r}")

    @property
    def select(self) -> Selector:
        """Unbiased draws."""
        return sampled

    def samples_wanted(self, scores: Tensor) -> Tensor:
        """Return sum p_i at the largest added noise that the target allows."""
        # If the j samples of the smallest scores are drawn and all others are certain, with sums
        # S = s_1 + ... + s_j and Q = s_1^2 + ... + s_j^2, the added variance is S / c - Q. At
        # 1 / c = s_j it is S s_j - Q, which grows with j: take the largest j within the bound.
        ordered = scores.sort().values
        sums, squares = ordered.cumsum(0), ordered.square().cumsum(0)
        bound = self.target * squares[-1]
        drawn = (sums * ordered - squares <= bound).sum().clamp(min=1) - 1
        # To index with a number would wait for a GPU.
        of_drawn, of_squares = (x.gather(0, drawn[None])[0] for x in (sums, squares))
        return scores.shape[0] - 1 - drawn + of_drawn * of_drawn / (bound + of_squares)


def default_rule() -> SampleRule:
    """Return the rule of `ssprop_compile(model)`; docs/study.md says why it is this one.

    Examples:
        >>> default_rule()
        AddedNoise(target=0.1, budget=None)
    """
    return AddedNoise(0.1)
