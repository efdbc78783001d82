"""Processes: the one process of a run, or the several that torchrun started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils.distributed import init_distributed_device_so, is_distributed_env
from torch import distributed

__all__ = ["Processes", "join_processes"]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """What one process knows of all processes of its run.

    With several of them, every method is a collective: all processes must call it.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        local_size: number of those on this machine.
        device: device of this process.

    Examples:
        >>> Processes().mean(2.0, 3.0)
        [2.0, 3.0]
    """

    rank: int = 0
    world_size: int = 1
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over the processes."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def mean(self, *values: float) -> list[float]:
        """Return the mean of each value over the processes."""
        return [total / self.world_size for total in self.sum(*values)]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in one of the processes."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def join_processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun or Slurm started; alone without them.

    Args:
        device: device of the run; where each process has its own, its index is chosen here.

    Yields:
        The processes.
    """
    if not is_distributed_env():
        yield Processes(device=device)
        return
    found = init_distributed_device_so(device=str(device))
    world_size = int(found["world_size"])
    try:
        yield Processes(
            rank=int(found["global_rank"]),
            world_size=world_size,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            device=torch.device(found["device"]),
        )
    finally:
        distributed.destroy_process_group()
