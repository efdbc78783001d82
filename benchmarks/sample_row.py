"""The row of `step --axis sample`, and the formula of its bound."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.timing import Timing
from benchmarks.workload import Workload

__all__ = ["FORMATS_OF_SAMPLES", "Phases", "SampleRow", "sample_bound"]

# Columns of the printed table; its heading names the model.
FORMATS_OF_SAMPLES = {
    "variant": "",
    "drop_rate": ".2f",
    "kept": "d",
    "forward_ms": ".1f",
    "backward_ms": ".1f",
    "step_ms": ".1f",
    "speedup": ".2f",
    "speedup_low": ".2f",
    "speedup_high": ".2f",
    "bound": ".2f",
    "share": ".2f",
    "peak_mib": ".0f",
    "first_s": ".0f",
}


def sample_bound(forward_ms: float, backward_ms: float, share_kept: float) -> float:
    """Return the speed-up if the backward took exactly its time times the share kept.

    Example:
        >>> sample_bound(forward_ms=50.0, backward_ms=100.0, share_kept=0.25)
        2.0
    """
    return (forward_ms + backward_ms) / (forward_ms + share_kept * backward_ms)


@dataclass(frozen=True)
class Phases:
    """Times of one variant.

    Attributes:
        forward, backward, step: timings of the two phases and of both together.
    """

    forward: Timing
    backward: Timing
    step: Timing

    @classmethod
    def of(cls, runs: Sequence[tuple[float, float]]) -> "Phases":
        """Return the timings of runs: forward and backward of each, in milliseconds."""
        forward, backward = zip(*runs, strict=True)
        return cls(Timing.of(forward), Timing.of(backward), Timing.of([sum(run) for run in runs]))


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One variant of one model whose backward keeps some samples.

    Attributes:
        model: name, resolution, batch, precision, layout.
        batch_size, img_size: images in a batch, and their height and width.
        variant: such as `dense`, `sliced` or the name of a peer.
        drop_rate: fraction of the samples left out.
        kept: samples that the backward keeps.
        forward_ms: time until the backward begins, the median of the rounds.
        backward_ms: time of the backward.
        step_ms: time of both.
        low_ms, high_ms: quartiles of the step's time.
        speedup: dense time over this time, the median of the ratios of the rounds.
        speedup_low, speedup_high: its 95 % confidence interval.
        bound: the speed-up if the backward took exactly the kept share of its dense time.
        share: speed-up over bound.
        peak_mib: peak memory of the step, minus the memory before it.
        first_s: wall time of the first step, in seconds, with its compile.
        clock: `wall time` or `processor time`.
    """

    model: str
    batch_size: int
    img_size: int
    variant: str
    drop_rate: float
    kept: int
    forward_ms: float
    backward_ms: float
    step_ms: float
    low_ms: float
    high_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    bound: float
    share: float
    peak_mib: float
    first_s: float
    clock: str

    @staticmethod
    def of(
        workload: Workload,
        variant: str,
        drop_rate: float,
        kept: int,
        phases: Phases,
        dense: Phases,
        peak_mib: float,
        first_s: float,
        clock: str,
    ) -> "SampleRow":
        """Make a row from its times and the times of the dense step."""
        speedup = dense.step.over(phases.step)
        share_kept = kept / workload.batch_size
        bound = sample_bound(dense.forward.median, dense.backward.median, share_kept)
        return SampleRow(
            model=workload.title,
            batch_size=workload.batch_size,
            img_size=workload.img_size,
            variant=variant,
            drop_rate=drop_rate,
            kept=kept,
            forward_ms=phases.forward.median,
            backward_ms=phases.backward.median,
            step_ms=phases.step.median,
            low_ms=phases.step.low,
            high_ms=phases.step.high,
            speedup=speedup.median,
            speedup_low=speedup.low,
            speedup_high=speedup.high,
            bound=bound,
            share=speedup.median / bound,
            peak_mib=peak_mib,
            first_s=first_s,
            clock=clock,
        )
