"""Ranks: the processes of a data-parallel run, and what they share of a selection.

Each process sees its part of a batch. Where all of them are to keep the same channels, those that
one process with the whole batch would keep, the replacement has two more collectives in it:

    scores = score(grad_output)                      of the samples of this rank
    scores = mean over ranks of scores               all_reduce, C numbers
    idx    = select(scores, k)
    idx    = that of rank 0                          broadcast, where a selector may draw numbers

They are functional collectives, operators of the compiled graph like any other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

__all__ = ["Ranks", "find_ranks_maybe"]


@dataclass(frozen=True)
class Ranks:
    """The processes that share a selection.

    Attributes:
        group: name of their process group, as torch has it.
        size: their number.
    """

    group: str
    size: int

    def mean(self, x: Tensor, power: int = 1) -> Tensor:
        """Return the mean over the ranks of each element, the same on all, in the dtype of `x`.

        Args:
            x: of the same shape on all ranks; one that holds NaN or infinity makes the mean so.
            power: exponent p of the power mean `(mean of x ** p) ** (1 / p)`: 2 for l2 norms over
                samples, of which those of the whole batch are that, but for a constant factor.
        """
        # In float64 the square of no float32 overflows or vanishes.
        wide = torch.promote_types(x.dtype, torch.float32 if power == 1 else torch.float64)
        powers = x.to(wide) if power == 1 else x.to(wide) ** power
        mean = _wait(torch.ops._c10d_functional.all_reduce(powers, "sum", self.group)) / self.size
        return (mean if power == 1 else mean ** (1 / power)).to(x.dtype)

    def first(self, x: Tensor) -> Tensor:
        """Return the tensor that rank 0 has."""
        return _wait(torch.ops._c10d_functional.broadcast(x.contiguous(), 0, self.group))


def find_ranks_maybe() -> Ranks | None:
    """Return the ranks of the default process group, None where there is none, or one rank alone.

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
    # Importing it registers what the operators return on fake tensors.
    import torch.distributed._functional_collectives  # noqa: F401

    return Ranks(group.group_name, size)


def _wait(x: Tensor) -> Tensor:
    done: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return done
