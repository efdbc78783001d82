"""Keep counts: find the runtime sparsity tensor in a graph, and read its slots.

Private torch: the shape environment's size hint for a keep count.
"""

from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph.state_inputs import StateInputs
from ssprop_passes.sites.flops import size_hint
from ssprop_passes.sites.site import MIN_KEEP_COUNT

__all__ = ["find_state_inputs", "read_keep_count"]

# When Inductor chooses code, it assumes that one in this many channels is kept.
_HINTED_SHARE = 5


def find_state_inputs(
    graph: fx.Graph, layout: StateInputs[Any], slot_count: int | None = None
) -> StateInputs[fx.Node]:
    """Return the state inputs of a joint graph: the last inputs of its forward.

    Args:
        graph: the joint graph.
        layout: which state inputs it has.
        slot_count: length of the runtime sparsity tensor, to check it.

    Raises:
        RuntimeError: the graph has no runtime sparsity tensor where one is expected.
    """
    placeholders: list[fx.Node] = graph.find_nodes(op="placeholder")
    inputs = [node for node in placeholders if str(node.target).startswith("primals")]
    _own, state = layout.split(inputs)
    if state.keep_counts is not None and slot_count is not None:
        val = state.keep_counts.meta["val"]
        if not isinstance(val, Tensor) or val.dtype != torch.int64 or val.shape != (slot_count,):
            raise RuntimeError(
                "an input of the joint graph must be the runtime sparsity tensor, int64"
                f" [{slot_count}], got {val}"
            )
    return state


def read_keep_count(keep_counts: Tensor, slot: int, limit: int, block: int = 1) -> int:
    """Return a slot's keep count in blocks; an unbacked SymInt during tracing.

    Counting blocks tells torch that the number of channels is a multiple of the block size.

    Args:
        keep_counts: the runtime sparsity tensor.
        slot: index in that tensor.
        limit: the largest keep count; may be a SymInt.
        block: keep counts are multiples of this.
    """
    blocks = keep_counts[slot] if block == 1 else keep_counts[slot] // block
    count = cast(int, blocks.item())
    typical = size_hint(limit) // block
    torch._check(count >= min(MIN_KEEP_COUNT, typical))
    torch._check(count <= limit // block)
    # Without a hint for this size, Inductor does not fuse a kernel that writes with one that reads.
    node: Any = cast(torch.SymInt, count).node
    node.shape_env.var_to_hint_override[node.expr] = max(typical // _HINTED_SHARE, 1)
    return count
