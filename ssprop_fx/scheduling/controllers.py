"""Controllers: drop rates of single layers, from what their sparse backwards tell.

A controller is a frozen dataclass, a pure function from what was seen of each layer to its drop
rate; `SparsityScheduler` calls it every few steps and holds what came of it. The pattern is VCAS
(Wang et al., ICLR 2024), which adapts sampling ratios to a bound on the variance that they add.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log

from ssprop_fx.scheduling.telemetry import SiteTelemetry

__all__ = ["LAG", "AddedError", "Controller", "KeptMass", "Seen"]

# Steps between a backward and the decision on what it told: on a GPU, it has arrived by then.
LAG = 2

# Share of the way, in the logarithm, from what is kept to what a decision takes to be right. All of
# it would swing for ever between too much and too little where channels are dead, and the others
# alike: what holds the target there lies far from where a curve through one point has it.
_GAIN = 1 / 2

# Halvings of the interval in which the level is looked for that a budget allows.
_HALVINGS = 30


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of a layer.

    Attributes:
        kept: share of its channels that were kept, in (0, 1].
        aimed: the same before rounding.
        telemetry: what the backward that kept these told.
        flops: share of the dense backward's FLOPs that the layer's sparse gradients take at full
            size.
        kept_at: drop rate -> share of its channels that are kept at it, rounded as they will be.
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
            layers: what was seen of each layer, by name; at least one.
            rest: share of the dense backward's FLOPs that all others take.
        """


@dataclass(frozen=True)
class _Target(Controller):
    """Holds every layer at one level, the target's or, if a budget forbids that, the nearest."""

    target: float
    budget: float | None = None
    every: int = 20

    def __post_init__(self) -> None:
        _check_number("target", self.target)
        if self.budget is not None:
            _check_number("budget", self.budget)
            if not 0 < self.budget <= 1:
                raise ValueError(f"budget must be in (0, 1] or None, got {self.budget!r}")
        if isinstance(self.every, bool) or not isinstance(self.every, int):
            raise TypeError(f"every must be an int, got {self.every!r}")
        if self.every <= LAG:
            raise ValueError(
                f"every must be at least {LAG + 1}, because what is decided on is {LAG} steps old,"
                f" got {self.every}"
            )

    def decide(self, layers: Mapping[str, Seen], rest: float) -> dict[str, float]:
        """Return drop rates in [0, 1), half of the way to where each layer is at the level."""

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
        """Return the level that is the target at strictness 1 and the loosest of all at 0."""

    @abstractmethod
    def _share(self, seen: Seen, level: float) -> float:
        """Return the share of a layer's channels to keep for the level."""


@dataclass(frozen=True)
class KeptMass(_Target):
    """Keeps as many channels of each layer as hold a share of its score.

    Of a layer that kept a share f of its channels with a mass m, a share g is taken to hold
    g ** (log m / log f): exact at what was seen, at 0 and at 1. Keep counts stay rounded to
    `SparsityConfig.channel_multiple`, to the nearest, so that a layer of few channels misses the
    target by what one multiple holds, and the mean over layers by little.

    Args:
        target: kept mass to hold, in (0, 1); of the l2 norms of gradients, with the default score.
        budget: most of the dense backward's FLOPs that a sparse step may take, in (0, 1]: what no
            layer's rate can save counts as well. Where the target takes more, all layers are held
            at the highest kept mass that does not; where no such is, at the smallest keep counts.
            None for no bound.
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

    def _level(self, strictness: float) -> float:
        return self.target * strictness

    def _share(self, seen: Seen, level: float) -> float:
        if seen.kept == 1:
            # It tells nothing; of a flat gradient, so many channels would hold the level.
            return level
        mass = min(max(seen.telemetry.kept_mass, 1e-6), 1 - 1e-6)
        exponent = log(mass) / log(seen.kept)
        return float(level ** (1 / exponent))


@dataclass(frozen=True)
class AddedError(_Target):
    """Keeps as many channels of each layer as bound the error that the others leave.

    The error is `SiteTelemetry.error`: squared, and a share of the gradient's squared norm. Of an
    unbiased selector it is the variance added. Of a layer that kept a share f of its channels with
    an error v, a share g is taken to leave v * odds(g) / odds(f), with odds(f) = (1 - f) / f: right
    for unbiased selectors at a flat gradient, and a step towards the target for all others.

    Args:
        target: error to hold, above 0.
        budget: as of `KeptMass`, with the smallest error that it allows.
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


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
