"""Communication of kept rows: ranks do not send gradient rows that are zero on all of them.

In a weight's gradient, a sparse backward leaves the rows that it did not keep at zero. If all
ranks keep the same rows, an all-reduce of whole gradients sends mostly zeros:

    before    grad = all_reduce(grad) / ranks

    after     rows = all_reduce(any(grad != 0, of each row), max)
              grad[rows] = all_reduce(grad[rows]) / ranks

The ranks agree on the rows from the gradients themselves, with one byte a row, not from the
selection. So the result is right for accumulated gradients, shared weights, dense steps and ranks
that keep different channels; these only send more.
"""

from typing import cast

import torch
from torch import Tensor, distributed
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

__all__ = ["KeptRows", "kept_rows_hook"]


class KeptRows:
    """State of `kept_rows_hook`: counts the bytes that this rank has passed to collectives.

    Attributes:
        group: the processes that average their gradients; None for the default group.
        sent_bytes: bytes of kept rows, of other parameters and of the agreement on rows.
        dense_bytes: bytes of the whole gradients, for comparison.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.sent_bytes = 0
        self.dense_bytes = 0


def kept_rows_hook(state: KeptRows, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket of gradients over the ranks; send only rows that are nonzero on some rank.

    A communication hook for DistributedDataParallel:
    `ddp.register_comm_hook(KeptRows(), kept_rows_hook)`. With two ranks the result equals the plain
    all-reduce bit for bit. With more, floating-point sums may have another order.

    Args:
        state: the group, and the byte counts.
        bucket: the gradients.

    Returns:
        A future of the bucket's buffer, averaged.
    """
    buffer, gradients = bucket.buffer(), bucket.gradients()
    state.dense_bytes += buffer.nbytes
    buffer.div_(distributed.get_world_size(state.group))
    tables = [gradient for gradient in gradients if gradient.ndim > 1]
    others = [gradient for gradient in gradients if gradient.ndim <= 1]
    rows: list[Tensor] = []
    if tables:
        held = torch.cat([table.flatten(1).any(1) for table in tables]).to(torch.uint8)
        distributed.all_reduce(held, distributed.ReduceOp.MAX, group=state.group)
        state.sent_bytes += held.nbytes
        sizes = [table.shape[0] for table in tables]
        rows = [part.nonzero()[:, 0] for part in torch.split(held, sizes)]
    kept = [table[index] for table, index in zip(tables, rows, strict=True)]
    kept += others
    packed = torch.cat([part.flatten() for part in kept])
    state.sent_bytes += packed.nbytes
    work = distributed.all_reduce(packed, group=state.group, async_op=True)

    def unpack(future: Future[list[Tensor]]) -> Tensor:
        parts = torch.split(future.value()[0], [part.numel() for part in kept])
        for table, index, part in zip(tables, rows, parts, strict=False):
            table[index] = part.view(-1, *table.shape[1:])
        for other, part in zip(others, parts[len(tables) :], strict=True):
            other.copy_(part.view_as(other))
        return buffer

    return cast(Future[Tensor], work.get_future().then(unpack))
