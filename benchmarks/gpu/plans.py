"""Stage `plans`: what the first step at a new keep count costs.

A keep count is a shape, and cuDNN needs a plan for each shape. With
`torch.backends.cudnn.benchmark` it tries out its kernels for each of them.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.alone import alone
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.steps import CHANNELS, SLICED, Group, compiled_variants
from benchmarks.results import table
from benchmarks.timing import synchronize
from benchmarks.variants import Variant
from ssprop_fx import SparsityConfig

__all__ = ["PlanRow", "run"]

_FORMATS = {
    "variant": "",
    "benchmark": "",
    "drop_rate": ".2f",
    "first_ms": ".1f",
    "later_ms": ".1f",
    "extra_ms": ".1f",
}
# The first rate of each pair of lists compiles the step and has no row.
_RATES = {False: (0.5, 0.4, 0.6, 0.7), True: (0.55, 0.45, 0.65, 0.75)}


@dataclass(frozen=True)
class PlanRow:
    """The cost of one new keep count.

    Attributes:
        model: name, resolution, batch, precision, layout.
        variant: `channels` or `sliced`.
        benchmark: whether `torch.backends.cudnn.benchmark` was on, "yes" or "no".
        drop_rate: the drop rate that the step had for the first time.
        first_ms: wall time of that step.
        later_ms: wall time of later steps, their median.
        extra_ms: the difference.
    """

    model: str
    variant: str
    benchmark: str
    drop_rate: float
    first_ms: float
    later_ms: float
    extra_ms: float


def run(settings: Settings, name: str) -> None:
    """Measure, print and save."""
    workload = settings.workload("resnet50", 256)
    model, images = workload.build()
    rows: list[PlanRow] = []
    # One compile for all keep counts, as a schedule of many drop rates has it.
    channels = replace(CHANNELS, config=SparsityConfig(specialize=False))
    for group in (SLICED, channels):
        for benchmark, rates in _RATES.items():
            torch.backends.cudnn.benchmark = benchmark
            some = Group(group.name, group.config, rates)
            first, *others = compiled_variants(workload, model, images, some)
            first.step()
            for variant in others:
                with alone():
                    new_ms, *later = (_wall_ms(variant) for _ in range(4))
                later_ms = statistics.median(later)
                rows.append(
                    PlanRow(
                        workload.title,
                        variant.name,
                        "yes" if benchmark else "no",
                        variant.drop_rate,
                        new_ms,
                        later_ms,
                        new_ms - later_ms,
                    )
                )
                settings.save(rows, name)
    print(table(rows, _FORMATS))


def _wall_ms(variant: Variant) -> float:
    synchronize()
    start = time.perf_counter()
    variant.step()
    synchronize()
    return 1e3 * (time.perf_counter() - start)
