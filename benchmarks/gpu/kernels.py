"""Stage `kernels`: where the time of a step goes, by kind of kernel, dense and sparse.

A kernel's kind follows from its name. On a CPU, in a rehearsal, operators take the place of
kernels. `idle` is the time between the first and the last kernel of a phase in which none runs;
the profiler slows launches down, so it may be too long.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.alone import alone
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.steps import CHANNELS, SLICED, compiled_variants, dense_variant
from benchmarks.phases import before_backward
from benchmarks.timing import synchronize
from benchmarks.variants import DENSE, Variant

__all__ = ["KernelRow", "kind_of", "missing", "run"]

# The first that matches counts.
_KINDS = (
    ("Inductor, sums", r"^triton_(red|per|mix)"),
    ("Inductor, element-wise", r"^triton_"),
    ("change of layout", r"nhwcToNchw|nchwToNhwc"),
    ("attention", r"flash|fmha|attention"),
    ("convolution", r"conv|dgrad|wgrad|fprop|cudnn|implicit_gemm"),
    ("matrix product", r"gemm|cublas|nvjet|cutlass|^aten::(mm|bmm|addmm)$"),
    ("sort", r"sort|topk|radix|bitonic"),
    ("gather, scatter", r"index|gather|scatter"),
    ("copy, fill", r"memcpy|memset|copy|fill"),
)
_OTHER, _IDLE = "other", "idle"


@dataclass(frozen=True)
class KernelRow:
    """The time of one kernel in one phase of a step.

    Attributes:
        model: name, resolution, batch, precision, layout.
        variant: `dense` or a sparse variant.
        drop_rate: fraction of channels or samples left out.
        phase: `forward` or `backward`.
        kind: what the kernel does.
        kernel: its name, cut to 100 characters.
        calls: how often it ran.
        ms: time of all calls.
    """

    model: str
    variant: str
    drop_rate: float
    phase: str
    kind: str
    kernel: str
    calls: int
    ms: float


def run(settings: Settings, name: str) -> None:
    """Profile one step of each variant, print times by kind, and save times by kernel."""
    workload = settings.workload("resnet50", 256)
    model, images = workload.build()
    dense = dense_variant(workload, model, images)
    rows: list[KernelRow] = []
    for variants in (
        lambda: [dense],
        lambda: compiled_variants(workload, model, images, SLICED),
        lambda: compiled_variants(workload, model, images, CHANNELS),
    ):
        for variant in variants():
            found = _profile(variant, settings)
            rows += [
                KernelRow(workload.title, variant.name, variant.drop_rate, *key, *value)
                for key, value in found.items()
            ]
            settings.save(rows, name)
            print(_summary(rows), flush=True)


def kind_of(kernel: str) -> str:
    """Return what a kernel does, from its name.

    Example:
        >>> kind_of("triton_red_fused_native_batch_norm_backward_12")
        'Inductor, sums'
        >>> kind_of("sm90_xmma_dgrad_implicit_gemm_bf16")
        'convolution'
    """
    return next((k for k, form in _KINDS if re.search(form, kernel, re.IGNORECASE)), _OTHER)


def missing(rows: Sequence[KernelRow], variant: str, drop_rate: float) -> dict[str, float]:
    """Return what keeps a sparse backward from its bound: milliseconds by kind, largest first.

    Args:
        rows: rows of the dense step and of the variant.
        variant: name of the variant.
        drop_rate: its drop rate.

    Returns:
        Kind -> time in its backward, minus the kept share of the time in the dense backward.
    """
    times = _by_kind(rows)
    kinds = {row.kind for row in rows if row.phase == "backward"}
    over = {
        kind: times[variant, drop_rate, "backward", kind]
        - (1 - drop_rate) * times[DENSE, 0.0, "backward", kind]
        for kind in kinds
    }
    return dict(sorted(over.items(), key=lambda item: -item[1]))


def _by_kind(rows: Sequence[KernelRow]) -> defaultdict[tuple[str, float, str, str], float]:
    times: defaultdict[tuple[str, float, str, str], float] = defaultdict(float)
    for row in rows:
        times[row.variant, row.drop_rate, row.phase, row.kind] += row.ms
    return times


def _summary(rows: Sequence[KernelRow]) -> str:
    """Return the times by kind, one column for each variant, and what is missing."""
    times = _by_kind(rows)
    variants = list(dict.fromkeys((row.variant, row.drop_rate) for row in rows))
    kinds = list(dict.fromkeys((row.phase, row.kind) for row in rows))
    lines = [" | ".join(["phase", "kind", *(f"{v} {rate:g}" for v, rate in variants)])]
    lines += [
        " | ".join([phase, kind, *(f"{times[v, rate, phase, kind]:.2f}" for v, rate in variants)])
        for phase, kind in kinds
    ]
    for variant, rate in variants[1:]:
        over = list(missing(rows, variant, rate).items())[:3]
        lines.append(
            f"{variant} {rate:g}, missing: {', '.join(f'{k} {ms:.2f} ms' for k, ms in over)}"
        )
    return "\n".join(lines)


def _profile(variant: Variant, settings: Settings) -> dict[tuple[str, str, str], tuple[int, float]]:
    """Return phase, kind and kernel -> calls and milliseconds of one step."""
    for _ in range(3):
        variant.step()
    forward, backward = (_profiler(settings.is_cuda) for _ in range(2))

    def turn() -> None:
        synchronize()
        forward.__exit__(None, None, None)
        backward.__enter__()

    with alone(), before_backward(turn):
        synchronize()
        forward.__enter__()
        variant.step()
        synchronize()
        backward.__exit__(None, None, None)
    found: dict[tuple[str, str, str], tuple[int, float]] = {}
    for phase, profiler in (("forward", forward), ("backward", backward)):
        for kernel, (calls, ms) in _times(profiler.events(), settings.is_cuda).items():
            kind = _IDLE if kernel == _IDLE else kind_of(kernel)
            found[phase, kind, kernel] = calls, ms
    return found


def _profiler(is_cuda: bool) -> Any:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda
    return profile(activities=activities)


def _times(events: Iterable[Any], is_cuda: bool) -> dict[str, tuple[int, float]]:
    """Return kernel -> calls and milliseconds; operators on a CPU."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    begin, end = float("inf"), 0.0
    for event in events:
        if is_cuda != (event.device_type == DeviceType.CUDA):
            continue
        if is_cuda and not getattr(event, "is_user_annotation", False):
            begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
            found[event.name[:100]].append(event.time_range.elapsed_us() / 1e3)
        elif not is_cuda and event.self_cpu_time_total > 0:
            found[event.name[:100]].append(event.self_cpu_time_total / 1e3)
    times = {kernel: (len(ms), sum(ms)) for kernel, ms in found.items()}
    if is_cuda and times:
        busy = sum(ms for _, ms in times.values())
        times[_IDLE] = (0, max(0.0, (end - begin) / 1e3 - busy))
    return times
