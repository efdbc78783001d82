"""Peak memory of a step."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_mib"]


def peak_mib(step: Callable[[], object], device: str) -> float:
    """Return the peak memory of tensors during a step, minus their memory before it.

    On a GPU torch's caching allocator counts it. On a CPU it is the largest running sum of the
    allocations and releases that the profiler records. Neither counts memory that libraries
    allocate, such as oneDNN's scratchpads, or the model and its input, which exist before the step.

    Args:
        step: runs forward and backward, already compiled, with no gradients left from the last
            step.
        device: device of the step.

    Returns:
        MiB, including gradients.

    Example:
        >>> def step():
        ...     torch.ones(3 * 2**18)
        ...     torch.ones(2**18)
        >>> peak_mib(step, "cpu")
        3.0
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events), default=0) / 2**20
