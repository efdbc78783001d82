"""Steps timed by CUDA events: without a wait between forward and backward, as in training."""

import statistics
import time
import warnings
from collections.abc import Callable

import torch

from benchmarks.memory import peak_mib
from benchmarks.phases import PhasedStep, Step, before_backward
from benchmarks.timing import synchronize
from benchmarks.variants import Variant

__all__ = ["EventStep", "count_waits", "elapsed_ms", "phased"]


class EventStep:
    """A variant's step on a GPU, timed by events in its stream.

    A step that is not timed runs right before. So the GPU is busy while the timed step is
    launched, as in training, where one step follows the other.

    Args:
        variant: the variant.
        device: its device.
    """

    def __init__(self, variant: Variant, device: str) -> None:
        self.variant = variant
        self.device = device
        self.phases: list[tuple[float, float]] = []

    def __call__(self) -> None:
        """Run the step twice; time the second."""
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self.variant.step()
        with before_backward(middle.record):
            begin.record()
            self.variant.step()
            end.record()
        end.synchronize()
        self.phases.append((begin.elapsed_time(middle), middle.elapsed_time(end)))

    def peak_mib(self) -> float:
        """Return the peak memory of a step."""
        self.variant.model.zero_grad()
        return peak_mib(self.variant.run, self.device)


def phased(variant: Variant, device: str) -> Step:
    """Return a variant's step: timed by events on a GPU, by the clock on a CPU."""
    if torch.device(device).type == "cuda":
        return EventStep(variant, device)
    return PhasedStep(variant, device, time.perf_counter)


def count_waits(step: Callable[[], object]) -> int:
    """Return how often a step waits for the GPU; 0 without a GPU.

    Args:
        step: a step, already compiled.
    """
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    for wait in waits:
        print(f"waits for the GPU: {wait.filename}:{wait.lineno}", flush=True)
    return len(waits)


def elapsed_ms(call: Callable[[], object], device: str, runs: int = 10) -> float:
    """Return the median time of a call, in milliseconds, after three that do not count."""
    is_cuda = torch.device(device).type == "cuda"
    times = []
    for run in range(3 + runs):
        if is_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            synchronize()
            spent = begin.elapsed_time(end)
        else:
            start = time.perf_counter()
            call()
            spent = 1e3 * (time.perf_counter() - start)
        if run >= 3:
            times.append(spent)
    return statistics.median(times)
