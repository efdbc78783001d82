"""FLOPs of matrix products; sizes of fake tensors as plain numbers."""

from typing import Any, cast

import torch
from torch import Tensor, fx

__all__ = ["hinted", "matrix_product_flops", "size_hint"]


def matrix_product_flops(node: fx.Node) -> int:
    """Return the FLOPs of a matrix product node, 0 for any other node.

    The formulas are those of `torch.utils.flop_counter`. Symbolic sizes count as their hints.
    """
    # Imported here, because it imports Triton.
    from torch.utils.flop_counter import flop_registry

    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in flop_registry:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: hinted(n.meta["val"]))
    val = node.meta["val"]
    out = hinted(val) if isinstance(val, Tensor) else tuple(map(hinted, val))
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


def hinted(val: Any) -> Any:
    """Return a tensor as a meta tensor with plain int sizes, any other value unchanged."""
    if not isinstance(val, Tensor):
        return val
    return torch.empty([*map(size_hint, val.shape)], device="meta", dtype=val.dtype)


def size_hint(size: int) -> int:
    """Return a size as an int; for a SymInt, its size in the example input."""
    return size if isinstance(size, int) else cast(int, size.node.hint)
