"""Floating-point operations of matrix products; sizes of fake tensors as plain numbers."""

from typing import Any, cast

import torch
from torch import Tensor, fx

__all__ = ["hinted", "matrix_product_flops", "size_hint"]


def matrix_product_flops(node: fx.Node) -> int:
    """Return the floating-point operations of a matrix product node, 0 for any other node.

    Formulas are those of `torch.utils.flop_counter`. Symbolic sizes count at their hint.
    """
    # Not on import: it imports Triton.
    from torch.utils.flop_counter import flop_registry

    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in flop_registry:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: hinted(n.meta["val"]))
    val = node.meta["val"]
    out = hinted(val) if isinstance(val, Tensor) else tuple(map(hinted, val))
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


def hinted(val: Any) -> Any:
    """Return a meta tensor with plain int sizes in place of a fake tensor, others unchanged."""
    if not isinstance(val, Tensor):
        return val
    return torch.empty([*map(size_hint, val.shape)], device="meta", dtype=val.dtype)


def size_hint(size: int) -> int:
    """Return a size as an int, that of the example input where it is a SymInt."""
    return size if isinstance(size, int) else cast(int, size.node.hint)
