"""The row of a timed step on a GPU, and the bounds of its speed-up."""

from dataclasses import dataclass

from benchmarks.backward_time import BackwardTime
from benchmarks.sample_row import Phases, sample_bound
from benchmarks.step_row import bound
from benchmarks.variants import Variant
from benchmarks.workload import Workload
from ssprop_fx import SparsityConfig
from ssprop_fx.scheduling.keep_counts import keep_count

__all__ = ["FORMATS", "GpuRow", "bound_of"]

FORMATS = {
    "variant": "",
    "mode": "",
    "drop_rate": ".2f",
    "forward_ms": ".2f",
    "backward_ms": ".2f",
    "step_ms": ".2f",
    "speedup": ".2f",
    "speedup_low": ".2f",
    "speedup_high": ".2f",
    "bound": ".2f",
    "share": ".2f",
    "saved_flops": ".0%",
    "peak_mib": ".0f",
    "waits": "d",
    "first_s": ".0f",
}


@dataclass(frozen=True, kw_only=True)
class GpuRow:
    """One variant of one model.

    Attributes:
        model: name, resolution, batch, precision, layout.
        batch_size, img_size: images in a batch, and their height and width.
        variant: `dense`, `channels`, `sliced`, `two passes` or `eager`.
        mode: `mode` of `torch.compile`; "default" if none is given.
        drop_rate: fraction of channels or samples left out.
        forward_ms, backward_ms, step_ms: time of the phases and of both: medians of the rounds.
        low_ms, high_ms: quartiles of the step's time.
        speedup: dense time over this time, the median of the ratios of the rounds.
        speedup_low, speedup_high: its 95 % confidence interval.
        bound: the speed-up if what is dropped cost nothing; see `bound_of`.
        share: speed-up over bound.
        saved_flops: share of the backward's floating-point operations left out.
        peak_mib: peak memory of the step, minus the memory before it.
        waits: how often a step waits for the GPU.
        first_s: wall time of the first step, in seconds, with its compile.
    """

    model: str
    batch_size: int
    img_size: int
    variant: str
    mode: str
    drop_rate: float
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
    saved_flops: float
    peak_mib: float
    waits: int
    first_s: float

    @staticmethod
    def of(
        workload: Workload,
        variant: Variant,
        mode: str | None,
        timed: tuple[Phases, Phases],
        bound: float,
        peak_mib: float,
        waits: int,
        first_s: float,
    ) -> "GpuRow":
        """Make a row.

        Args:
            workload: the workload.
            variant: the variant.
            mode: `mode` of `torch.compile`.
            timed: its timings, and those of the dense step in the same rounds.
            bound: bound of the speed-up.
            peak_mib: peak memory.
            waits: waits for the GPU.
            first_s: time of the first step.
        """
        phases, dense = timed
        speedup = dense.step.over(phases.step)
        return GpuRow(
            model=workload.title,
            batch_size=workload.batch_size,
            img_size=workload.img_size,
            variant=variant.name,
            mode=mode or "default",
            drop_rate=variant.drop_rate,
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
            saved_flops=variant.saved_flops(),
            peak_mib=peak_mib,
            waits=waits,
            first_s=first_s,
        )


def bound_of(
    config: SparsityConfig | None,
    drop_rate: float,
    batch_size: int,
    dense: Phases,
    backward: BackwardTime,
) -> float:
    """Return the speed-up if what a variant drops cost nothing.

    With forward F, backward B and time T = F + B of the dense step, and the share q of samples
    kept:

        channels      T / (T - d * T_backward), with the time of the layers' backward
        sliced        T / (F + q B)
        two passes    T / (F + q (F + B))

    Args:
        config: configuration of the variant; None for a variant that drops nothing.
        drop_rate: its drop rate d.
        batch_size: samples in a batch.
        dense: timings of the dense step.
        backward: the part of the dense step's time that channels can reduce.
    """
    if config is None:
        return 1.0
    forward_ms, backward_ms = dense.forward.median, dense.backward.median
    if config.axis == "channel":
        return bound(dense.step.median, backward.total_ms, drop_rate)
    again_ms = forward_ms if config.saved == "kept" else 0.0
    share_kept = keep_count(batch_size, drop_rate) / batch_size
    most = sample_bound(forward_ms, again_ms + backward_ms, share_kept)
    return most * (forward_ms + backward_ms) / (forward_ms + again_ms + backward_ms)
