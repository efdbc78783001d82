"""Timing: variants in turn, medians, spread."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Timing", "alternate", "synchronize"]


@dataclass(frozen=True)
class Timing:
    """Times of one variant, in milliseconds.

    Attributes:
        median: of all runs.
        low, high: first and third quartile.
    """

    median: float
    low: float
    high: float


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def alternate(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    prepare: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, Timing]:
    """Time each variant once a round, in turn, so that a drift of the machine meets all of them.

    Args:
        variants: name -> function that runs one step.
        rounds: timed runs of each variant.
        warmup: untimed runs of each variant at the beginning, compilation included.
        prepare: name -> function to run before each run of that variant, untimed.

    Returns:
        Name -> timing.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in range(warmup + rounds):
        # Every other round runs backwards, so that no variant always follows the same one.
        for name in list(variants)[:: 1 if run % 2 else -1]:
            if prepare and name in prepare:
                prepare[name]()
            synchronize()
            start = time.perf_counter()
            variants[name]()
            synchronize()
            if run >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summarize(values) for name, values in times.items()}


def _summarize(values: list[float]) -> Timing:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return Timing(statistics.median(values), low, high)
