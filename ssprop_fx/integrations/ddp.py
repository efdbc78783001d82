"""Communication of kept rows: what no rank has computed is not sent.

A sparse backward leaves the rows of a weight's gradient that it did not keep at zero. Where all
ranks keep the same rows, an all-reduce of whole gradients sends mostly zeros:

    before    grad = all_reduce(grad) / ranks

    after     rows = all_reduce(any(grad != 0, of each row), max)
              grad[rows] = all_reduce(grad[rows]) / ranks

The rows are agreed on by what the gradients hold, one byte a row, and not by what a selection
chose. So it holds for accumulated gradients, for weights that several layers share, for dense
steps and for ranks that keep channels of their own; these only send more.
"""

from typing import cast

import torch
from torch import Tensor, distributed
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

__all__ = ["KeptRows", "kept_rows_hook"]


class KeptRows:
    """State of `kept_rows_hook`: what was handed to collectives so far, by this rank.

    Attributes:
        group: the processes that average their gradients; None for the default group.
        sent_bytes: of kept rows, other parameters and the bytes that rows are agreed on with.
        dense_bytes: of the whole gradients.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.sent_bytes = 0
        self.dense_bytes = 0


def kept_rows_hook(state: KeptRows, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket of gradients over the ranks, sending only rows that are not zero on all.

    A communication hook of DistributedDataParallel:
    `ddp.register_comm_hook(KeptRows(), kept_rows_hook)`. Between two ranks the result is that of
    the plain all-reduce bit for bit; between more, sums of floating-point numbers may be taken in
    another order.

    Args:
        state: counts bytes.
        bucket: the gradients.

    Returns:
        The bucket's buffer, averaged.
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
