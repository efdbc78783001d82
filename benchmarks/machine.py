"""The machine and the allocator of a measurement."""

import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

from ssprop_fx.training.allocator import keep_freed_memory

__all__ = ["allocator", "commit", "describe", "environment"]


@functools.cache
def allocator() -> str:
    """Keep freed memory in the process from now on, and describe the allocator.

    Every row of every benchmark runs like this. With glibc's defaults a step on a CPU, dense or
    sparse, pays a page fault for every 4 KiB of every large buffer.

    Returns:
        A description: whether glibc's malloc keeps freed memory, and `LD_PRELOAD` if it is set.
    """
    kept = "glibc keeps freed memory" if keep_freed_memory() else "default"
    preloaded = os.environ.get("LD_PRELOAD")
    return f"{kept}, LD_PRELOAD={preloaded}" if preloaded else kept


def environment(device: str) -> dict[str, str | int]:
    """Return the machine, the versions and the allocator of a measurement.

    Args:
        device: type of the measured device, `"cpu"` or `"cuda"`.

    Returns:
        Device, CPU threads, torch version, commit and allocator.
    """
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "allocator": f"CUDA {torch.cuda.get_allocator_backend()}" if is_cuda else allocator(),
    }


def describe(device: str) -> str:
    """Return `environment(device)` as one line."""
    return "; ".join(f"{key}: {value}" for key, value in environment(device).items())


def _cpu_name() -> str:
    """Return the processor's name and its vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """Return git's name of the commit, with `-dirty` if files have changed.

    The environment variable `BENCHMARK_COMMIT` replaces it, for a copy of the sources without
    history.
    """
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    found = _git("describe", "--always")
    # Ignore changed results: they do not affect a measurement.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*/results/*")
    return f"{found}-dirty" if found and changed else found or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
