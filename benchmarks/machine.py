"""The machine and the allocator that a result was measured with."""

import functools
import os
import platform
import subprocess
from pathlib import Path

import torch

from ssprop_fx.training.allocator import keep_freed_memory

__all__ = ["allocator", "describe", "environment"]


@functools.cache
def allocator() -> str:
    """Let freed memory stay in the process from now on, and say which allocator that leaves.

    Every row of every benchmark runs like this: with glibc's defaults a step on a CPU pays a page
    fault for every 4 KiB of every large buffer, dense and sparse alike.

    Returns:
        A description: what `LD_PRELOAD` put in glibc's place, if anything, and whether glibc's
        malloc was told to keep freed memory.
    """
    kept = "glibc keeps freed memory" if keep_freed_memory() else "default"
    preloaded = os.environ.get("LD_PRELOAD")
    return f"{kept}, LD_PRELOAD={preloaded}" if preloaded else kept


def environment(device: str) -> dict[str, str | int]:
    """Return the machine, the versions and the allocator that a result was measured with.

    Args:
        device: type of the device that was measured, `"cpu"` or `"cuda"`.

    Returns:
        Device, CPU threads, torch version, commit (`BENCHMARK_COMMIT` of the environment, for a
        copy of the sources without their history, else git's), allocator.
    """
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": os.environ.get("BENCHMARK_COMMIT") or _commit(),
        "allocator": f"CUDA {torch.cuda.get_allocator_backend()}" if is_cuda else allocator(),
    }


def describe(device: str) -> str:
    """Return `environment(device)` as one line."""
    return "; ".join(f"{key}: {value}" for key, value in environment(device).items())


def _cpu_name() -> str:
    """Return the processor's name and its vector instructions, which its name does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    commit = _git("describe", "--always")
    # Changed results change no measurement.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*/results/*")
    return f"{commit}-dirty" if commit and changed else commit or "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
