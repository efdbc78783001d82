"""`python -m benchmarks.gpu.ahead`: compiles the steps of later stages into the shared cache.

A compile uses one core for most of its time, so some run side by side while a stage runs. They
hardly touch the GPU: each may take a small part of its memory, and ends when its first step asks
for more. `alone` stops them while a step is timed. Channels are not among them: their gate times
layers on the GPU.

Private torch: AOTAutograd's setting that compiles the backward together with the forward.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.settings import Settings, Stage
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.steps import Group, StepStage, compiled_variants, dense_variant

__all__ = ["Task", "command", "tasks"]

# With fewer cores, a compile beside a stage would slow it down.
_MIN_CORES = 8
_MEMORY = 0.1


@dataclass(frozen=True)
class Task:
    """One compile.

    Attributes:
        model: name of the timm model.
        batch_size: images in a batch.
        group: the rows; None for the dense step.
    """

    model: str
    batch_size: int
    group: Group | None


def tasks(stages: Sequence[Stage]) -> list[Task]:
    """Return the compiles of some stages, in the order in which they are needed."""
    return [
        Task(stage.run.model, stage.run.batch_size, group)
        for stage in stages
        if isinstance(stage.run, StepStage) and stage.run.modes == (None,)
        for group in (None, *stage.run.groups)
        if group is None or (group.config is not None and group.config.axis == "sample")
    ]


def command(stages: Sequence[Stage], device: str) -> list[str]:
    """Return the command that compiles for some stages; empty if the machine has few cores."""
    names = [stage.name for stage in stages]
    if (os.cpu_count() or 1) < _MIN_CORES or not tasks(stages):
        return []
    return [sys.executable, "-m", "benchmarks.gpu.ahead", "--device", device, "--stages", *names]


def main() -> None:
    """Run the compiles of the command line, some side by side; with `--task`, one of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.ahead", description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--stages", nargs="+", required=True)
    parser.add_argument("--task", type=int, help="number of the only compile to run")
    args = parser.parse_args()
    todo = tasks([stage for stage in STAGES if stage.name in args.stages])
    if args.task is not None:
        _compile(todo[args.task], Settings(args.device, args.tiny, Path()))
        return
    commands = [[sys.executable, *sys.orig_argv[1:], "--task", str(n)] for n in range(len(todo))]
    os.nice(10)
    with ThreadPoolExecutor((os.cpu_count() or 1) // 4) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=False), commands))


def _compile(task: Task, settings: Settings) -> None:
    if settings.is_cuda:
        torch.cuda.set_per_process_memory_fraction(_MEMORY)
    workload = settings.workload(task.model, task.batch_size)
    model, images = workload.build()
    if task.group is None:
        variant = dense_variant(workload, model, images)
    else:
        variant, *_ = compiled_variants(workload, model, images, task.group)
    # Otherwise the backward compiles after the forward has run, for which memory is missing.
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        try:
            variant.step()
        except torch.OutOfMemoryError:
            print("out of memory, after the compile")
    print(f"compiled {workload.title}, {variant.name}", flush=True)


if __name__ == "__main__":
    main()
