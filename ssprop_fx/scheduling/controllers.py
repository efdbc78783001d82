"""Controllers: set the drop rate of each layer from the telemetry of its sparse backwards.

Rules for samples are in `sample_rules.py`; `KeptMass` is both.

A controller is a frozen dataclass, a pure function from observations of each layer to its drop
rate. `SparsityScheduler` calls it every few steps and holds the resulting rates. The pattern is
VCAS (Wang et al., ICLR 2024), which adapts sampling ratios to a bound on the variance that they
add.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log

from torch import Tensor

from ssprop_fx.scheduling.base import check_budget, check_number
from ssprop_fx.scheduling.sample_rules import SampleRule
from ssprop_fx.scheduling.telemetry import SiteTelemetry

__all__ = ["LAG", "AddedError", "Controller", "KeptMass", "Seen"]

# Steps from a backward to the decision that uses its telemetry: by then a GPU has delivered it.
LAG = 2

# How far a decision moves from the share kept to the share it computes, on a logarithmic scale.
# With a gain of 1 it would swing for ever between too much and too little if some channels are
# dead and the others alike: the right share is then far from the curve through one point.
_GAIN = 1 / 2

# Bisection steps in the search for the level that a budget allows.
_HALVINGS = 30


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Observations of one layer.

    Attributes:
        kept: share of its channels that were kept, in (0, 1].
        aimed: the same before rounding.
        telemetry: telemetry of the backward that kept these channels.
        flops: FLOPs of the layer's sparse gradients at full size, as a share of the dense
            backward's.
        kept_at: drop rate -> share of the layer's channels kept, after rounding.
    """

    kept: float
    aimed: float
    telemetry: SiteTelemetry
    flops: float
    kept_at: Callable[[float], float]


class Controller(ABC):
    """Decides the drop rate of each layer.

    Attributes:
        every: sparse steps from one decision to the next.
    """

    every: int

    @abstractmethod
    def decide(self, layers: Mapping[str, Seen], rest: float) -> dict[str, float]:
        """Return drop rates in [0, 1).

        Args:
            layers: observations of each layer, by name; at least one.
            rest: share of the dense backward's FLOPs that everything else takes.
        """


@dataclass(frozen=True)
class _Target(Controller):
    """Holds every layer at one level: the target, or the nearest that the budget allows."""

    target: float
    budget: float | None = None
    every: int = 20

    def __post_init__(self) -> None:
        check_number("target", self.target)
        check_budget(self.budget)
        if isinstance(self.every, bool) or not isinstance(self.every, int):
            raise TypeError(f"every must be an int, got {self.every!r}")
        if self.every <= LAG:
            raise ValueError(
                f"every must be at least {LAG + 1}, because telemetry is {LAG} steps old at a"
                f" decision, got {self.every}"
            )

    def decide(self, layers: Mapping[str, Seen], rest: float) -> dict[str, float]:
        """Return drop rates in [0, 1), half of the way to those that bring layers to the level."""

        def rates_at(strictness: float) -> dict[str, float]:
            level = self._level(strictness)
            shares = {
                name: seen.aimed ** (1 - _GAIN) * self._share(seen, level) ** _GAIN
                for name, seen in layers.items()
            }
            return {name: 1 - min(max(share, 1e-6), 1.0) for name, share in shares.items()}

        def is_within(rates: Mapping[str, float]) -> bool:
            flops = sum(layers[name].flops * layers[name].kept_at(r) for name, r in rates.items())
            return self.budget is None or rest + flops <= self.budget

        rates = rates_at(1.0)
        if is_within(rates):
            return rates
        within, beyond = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (within + beyond) / 2
            within, beyond = (middle, beyond) if is_within(rates_at(middle)) else (within, middle)
        return rates_at(within)

    @abstractmethod
    def _level(self, strictness: float) -> float:
        """Return the level for a strictness: the target at 1, the loosest level at 0."""

    @abstractmethod
    def _share(self, seen: Seen, level: float) -> float:
        """Return the share of a layer's channels to keep so that it is at the level."""


@dataclass(frozen=True)
class KeptMass(_Target, SampleRule):
    """Keeps as many samples, or channels of each layer, as hold the target share of the score.

    With `axis="sample"` it decides in each step: it keeps the fewest samples whose gradients of the
    model's outputs hold `target` of the sum of all l2 norms. `every` does not matter then.

    With `axis="channel"` it adapts the drop rate of each layer. If a share f of a layer's channels
    held the mass m, it estimates that a share g holds g ** (log m / log f): exact at the
    observation, at 0 and at 1. Keep counts are still rounded to the nearest multiple of
    `SparsityConfig.channel_multiple`. So a layer with few channels misses the target by the mass of
    one multiple; the mean over layers misses it by little.

    Args:
        target: kept mass to hold, in (0, 1). With the default score it is a share of the l2 norms
            of the gradients.
        budget: largest share of the dense backward's FLOPs that a sparse step may take, in (0, 1].
            FLOPs that no layer's rate can save count as well. If the target takes more, all layers
            are held at the highest kept mass within the budget; if there is none, at the smallest
            keep counts. Of samples, the largest share that a backward may keep. None for no bound.
        every: sparse steps from one decision to the next, at least 3.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.

    Examples:
        >>> from ssprop_fx import SparsityScheduler, constant
        >>> scheduler = SparsityScheduler(constant(0.5), controller=KeptMass(0.9, budget=0.6))
        >>> scheduler.controller
        KeptMass(target=0.9, budget=0.6, every=20)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target < 1:
            raise ValueError(f"target must be in (0, 1), got {self.target!r}")

    def samples_wanted(self, scores: Tensor) -> Tensor:
        """Return the smallest number of samples that hold the target share of the scores."""
        held = scores.sort(descending=True).values.cumsum(0)
        # Without this, the last digit of a sum would ask for one more sample.
        return (held < self.target * held[-1] * (1 - 1e-9)).sum() + 1

    def _level(self, strictness: float) -> float:
        return self.target * strictness

    def _share(self, seen: Seen, level: float) -> float:
        if seen.kept == 1:
            # The telemetry carries no information. With a flat gradient this share is right.
            return level
        mass = min(max(seen.telemetry.kept_mass, 1e-6), 1 - 1e-6)
        exponent = log(mass) / log(seen.kept)
        return float(level ** (1 / exponent))


@dataclass(frozen=True)
class AddedError(_Target):
    """Keeps as many channels of each layer as bound the error of leaving out the others.

    The error is `SiteTelemetry.error`: squared, as a share of the gradient's squared norm. For an
    unbiased selector it is the added variance. If keeping a share f of a layer's channels left the
    error v, the controller estimates that a share g leaves v * odds(g) / odds(f), with
    odds(f) = (1 - f) / f. This is right for unbiased selectors and a flat gradient, and a step
    towards the target in all other cases.

    Args:
        target: error to hold, above 0.
        budget: as in `KeptMass`; layers are held at the smallest error within the budget.
        every: sparse steps from one decision to the next, at least 3.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.

    Examples:
        >>> AddedError(0.1, every=50)
        AddedError(target=0.1, budget=None, every=50)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target > 0:
            raise ValueError(f"target must be above 0, got {self.target!r}")

    def _level(self, strictness: float) -> float:
        return self.target / max(strictness, 1e-9)

    def _share(self, seen: Seen, level: float) -> float:
        if seen.kept == 1:
            return 1 / (1 + level)
        odds = (1 - seen.kept) / seen.kept
        return 1 / (1 + odds * level / max(seen.telemetry.error, 1e-6))
