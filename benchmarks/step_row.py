"""The row of `step` and `scaling`, and the formulas of bound and efficiency."""

from dataclasses import dataclass
from math import nan

from benchmarks.backward_time import BackwardTime
from benchmarks.timing import Ratio, Timing
from benchmarks.workload import Workload

__all__ = ["FORMATS", "FORMATS_OF_VARIANTS", "StepRow", "bound", "efficiency"]

# Columns of the printed table; its heading names the model.
FORMATS = {
    "variant": "",
    "drop_rate": ".2f",
    "median_ms": ".1f",
    "low_ms": ".1f",
    "high_ms": ".1f",
    "speedup": ".2f",
    "speedup_low": ".2f",
    "speedup_high": ".2f",
    "bound": ".2f",
    "efficiency": ".2f",
    "saved_flops": ".0%",
    "peak_mib": ".0f",
}
# The columns with several configurations.
FORMATS_OF_VARIANTS = FORMATS | {"over_plain": ".3f", "over_low": ".3f", "over_high": ".3f"}


def bound(dense_ms: float, backward_ms: float, drop_rate: float) -> float:
    """Return the speed-up if the backward took exactly its time times (1 - drop_rate).

    Example:
        >>> bound(dense_ms=100.0, backward_ms=50.0, drop_rate=0.8)
        1.6666666666666667
    """
    return dense_ms / (dense_ms - drop_rate * backward_ms)


def efficiency(dense_ms: float, sparse_ms: float, backward_ms: float, drop_rate: float) -> float:
    """Return the saved time over the dropped share of the backward's time.

    Returns:
        1.0 if the step reaches the bound; NaN if nothing was dropped.

    Example:
        >>> efficiency(dense_ms=100.0, sparse_ms=60.0, backward_ms=50.0, drop_rate=0.8)
        1.0
        >>> efficiency(dense_ms=100.0, sparse_ms=70.0, backward_ms=50.0, drop_rate=0.8)
        0.75
    """
    savable = drop_rate * backward_ms
    return (dense_ms - sparse_ms) / savable if savable else float("nan")


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One variant of one model, in milliseconds and ratios.

    Attributes:
        model: name, resolution, batch, precision, layout.
        batch_size, img_size: images in a batch, and their height and width.
        variant: such as `dense`, `ssprop` or the name of a peer.
        drop_rate: fraction of channels left out.
        median_ms, low_ms, high_ms: step time and its quartiles.
        speedup: dense time over this time, the median of the ratios of the rounds.
        speedup_low, speedup_high: its 95 % confidence interval.
        backward_ms: the part of the dense step's time that sparsity can reduce: all backward
            convolutions and the backward products of the linear layers that take part.
        linear_backward_ms: the part of `backward_ms` in linear layers.
        bound: the speed-up at efficiency 1.
        efficiency: time saved, from `speedup`, over the dropped share of `backward_ms`; NaN at drop
            rate 0.
        saved_flops: share of the backward's floating-point operations that the step leaves out.
        peak_mib: peak memory of the step, minus the memory before it.
        over_plain: this time over the time of the first sparse configuration at the same drop rate,
            the median of the ratios of the rounds; NaN if there is none.
        over_low, over_high: its 95 % confidence interval.
    """

    model: str
    batch_size: int
    img_size: int
    variant: str
    drop_rate: float
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    backward_ms: float
    linear_backward_ms: float
    bound: float
    efficiency: float
    saved_flops: float
    peak_mib: float
    over_plain: float
    over_low: float
    over_high: float

    @staticmethod
    def of(
        workload: Workload,
        variant: str,
        drop_rate: float,
        timing: Timing,
        dense: Timing,
        backward: BackwardTime,
        saved_flops: float,
        peak_mib: float,
        plain: Timing | None = None,
    ) -> "StepRow":
        """Make a row from its timing and the timings of the dense and the plain sparse step."""
        speedup = dense.over(timing)
        over = Ratio(nan, nan, nan) if plain is None else timing.over(plain)
        return StepRow(
            model=workload.title,
            batch_size=workload.batch_size,
            img_size=workload.img_size,
            variant=variant,
            drop_rate=drop_rate,
            median_ms=timing.median,
            low_ms=timing.low,
            high_ms=timing.high,
            speedup=speedup.median,
            speedup_low=speedup.low,
            speedup_high=speedup.high,
            backward_ms=backward.total_ms,
            linear_backward_ms=backward.linear_ms,
            bound=bound(dense.median, backward.total_ms, drop_rate),
            # From the ratios of the rounds, like the speed-up: when the machine's speed drifts, the
            # two medians may come from different times.
            efficiency=efficiency(
                dense.median, dense.median / speedup.median, backward.total_ms, drop_rate
            ),
            saved_flops=saved_flops,
            peak_mib=peak_mib,
            over_plain=over.median,
            over_low=over.low,
            over_high=over.high,
        )
