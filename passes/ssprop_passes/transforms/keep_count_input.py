"""Keep counts: the runtime sparsity tensor in a graph, and how a slot of it is read.

Private torch: the shape environment's hint for the size that a keep count is.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.sites.site import MIN_KEEP_COUNT, size_hint

__all__ = ["find_keep_counts", "read_keep_count"]

# Of what there is to keep, one in so many is what a keep count is taken for where code is chosen.
_HINTED_SHARE = 5


def find_keep_counts(inputs: Sequence[fx.Node], slot_count: int) -> fx.Node:
    """Return the placeholder of the runtime sparsity tensor: the last of its form.

    Args:
        inputs: those of the forward.
        slot_count: length of the tensor.

    Raises:
        RuntimeError: there is none.
    """
    for node in reversed(inputs):
        val = node.meta["val"]
        if isinstance(val, Tensor) and val.dtype == torch.int64 and val.shape == (slot_count,):
            return node
    raise RuntimeError(
        f"the joint graph has no runtime sparsity tensor, int64 [{slot_count}], among its inputs"
    )


def read_keep_count(keep_counts: Tensor, slot: int, limit: int, block: int = 1) -> int:
    """Return a slot's keep count in blocks, an unbacked SymInt while this is traced.

    In blocks, so that the count of channels is known to be a multiple of their size.

    Args:
        keep_counts: the runtime sparsity tensor.
        slot: index in it.
        limit: the largest keep count; may be a SymInt.
        block: keep counts are multiples of this.
    """
    blocks = keep_counts[slot] if block == 1 else keep_counts[slot] // block
    count = cast(int, blocks.item())
    typical = size_hint(limit) // block
    torch._check(count >= min(MIN_KEEP_COUNT, typical))
    torch._check(count <= limit // block)
    # Of a size that it knows nothing of, Inductor fuses no kernel that writes with one that reads.
    node: Any = cast(torch.SymInt, count).node
    node.shape_env.var_to_hint_override[node.expr] = max(typical // _HINTED_SHARE, 1)
    return count
