"""Ranks: the processes of a data-parallel run, and how they share a selection.

Each process sees a part of the batch. All processes can keep the same channels, those that one
process with the whole batch would keep. The replacement then has two extra collectives:

    scores = score(grad_output)                      of this rank's samples
    scores = mean over ranks of scores               all_reduce, C numbers
    idx    = select(scores, k)
    idx    = idx of rank 0                           broadcast, if a selector may draw numbers

These are functional collectives, ordinary operators of the compiled graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

__all__ = ["Ranks", "find_ranks_maybe"]


@dataclass(frozen=True)
class Ranks:
    """The processes that share a selection.

    Attributes:
        group: torch's name of their process group.
        size: number of processes.
    """

    group: str
    size: int

    def mean(self, x: Tensor, power: int = 1) -> Tensor:
        """Return the mean of each element over the ranks, equal on all ranks, in the dtype of `x`.

        Args:
            x: has the same shape on all ranks. If an element is not finite on one rank, neither is
                its mean.
            power: exponent p of the power mean `(mean of x ** p) ** (1 / p)`. Use 2 for l2 norms
                over samples: the power mean is the norm over the whole batch, except for a
                constant factor.
        """
        # In float64 the square of a float32 neither overflows nor vanishes.
        wide = torch.promote_types(x.dtype, torch.float32 if power == 1 else torch.float64)
        powers = x.to(wide) if power == 1 else x.to(wide) ** power
        mean = _wait(torch.ops._c10d_functional.all_reduce(powers, "sum", self.group)) / self.size
        return (mean if power == 1 else mean ** (1 / power)).to(x.dtype)

    def first(self, x: Tensor) -> Tensor:
        """Return the tensor that rank 0 has."""
        return _wait(torch.ops._c10d_functional.broadcast(x.contiguous(), 0, self.group))


def find_ranks_maybe() -> Ranks | None:
    """Return the ranks of the default process group; None without a group or with only one rank.

    Examples:
        >>> find_ranks_maybe() is None
        True
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    size = distributed.get_world_size()
    group = distributed.group.WORLD
    if size == 1 or group is None:
        return None
    # The import registers the operators' fake kernels.
    import torch.distributed._functional_collectives  # noqa: F401

    return Ranks(group.group_name, size)


def _wait(x: Tensor) -> Tensor:
    done: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return done
