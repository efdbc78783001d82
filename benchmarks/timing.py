"""Timing of variants that take turns: medians, quartiles, and ratios within a round."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Ratio", "Timing", "alternate", "synchronize"]

# Bootstrap samples of the rounds.
_RESAMPLES = 1000


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two variants.

    Attributes:
        median: median of the ratios of the rounds.
        low, high: its 95 % confidence interval, by the percentile bootstrap over rounds (Efron and
            Tibshirani, An Introduction to the Bootstrap, chapter 13).
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Times of one variant, in milliseconds.

    Attributes:
        median: median of all runs.
        low, high: first and third quartile.
        runs: all runs, one per round.
    """

    median: float
    low: float
    high: float
    runs: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, runs: Sequence[float]) -> "Timing":
        """Return the timing of one or more runs."""
        low, _, high = statistics.quantiles(runs, n=4) if len(runs) > 1 else [runs[0]] * 3
        return cls(statistics.median(runs), low, high, tuple(runs))

    def over(self, other: "Timing") -> Ratio:
        """Return the ratio of these times to the times of another variant in the same rounds.

        When something slows the machine down for a while, it slows both runs of a round, and their
        ratio stays.

        Args:
            other: timing of a variant that took turns with this one.

        Example:
            >>> Timing.of([1.1, 2.2, 3.3]).over(Timing.of([1.0, 2.0, 3.0])).median
            1.1
        """
        ratios = [mine / others for mine, others in zip(self.runs, other.runs, strict=True)]
        draw = random.Random(0)
        medians = sorted(
            statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
        )
        tail = _RESAMPLES // 40
        return Ratio(statistics.median(ratios), medians[tail], medians[-1 - tail])


def synchronize() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    prepare: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each variant once per round, so that a drift of the machine's speed affects all of them.

    The order changes from round to round, because a step leaves memory and caches to the next step.
    With n variants, in n rounds each variant takes every place once. If n is even, it also follows
    every other variant once (Williams, Experimental designs balanced for the estimation of residual
    effects of treatments, 1949).

    Args:
        variants: name -> function that runs one step.
        rounds: timed runs of each variant.
        warmup: untimed runs of each variant at the beginning, including compilation.
        prepare: name -> function to run, untimed, before each run of that variant.
        clock: returns seconds. `time.process_time` counts the processor time of all threads, not
            the time that they wait.

    Returns:
        Name -> timing.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    # First, last, second, second to last, and so on, so that neighbours have all distances.
    places = [i // 2 if i % 2 == 0 else -1 - i // 2 for i in range(len(names))]
    for run in range(warmup + rounds):
        for name in (names[(place + run) % len(names)] for place in places):
            if prepare and name in prepare:
                prepare[name]()
            synchronize()
            start = clock()
            variants[name]()
            synchronize()
            if run >= warmup:
                times[name].append((clock() - start) * 1e3)
    return {name: Timing.of(runs) for name, runs in times.items()}
