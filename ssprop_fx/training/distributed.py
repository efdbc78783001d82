"""Processes: the processes of a run, one or as many as torchrun started."""

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
    """One process's view of all processes of its run.

    With several processes, every method is a collective: all processes must call it.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of processes.
        local_size: number of processes on this machine.
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
        """Return whether `flag` is set in any process."""
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
    """Join the processes that torchrun or Slurm started; without a launcher, run alone.

    Args:
        device: device of the run; with a launcher, each process gets its own index.

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
