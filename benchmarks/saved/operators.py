"""Operators of pruned activations, on a CPU, in float32 or float64.

    saved::prune(x, kept) -> values, masks
    saved::grad_weight(grad_output, values, masks) -> grad_output^T filled(values, masks)

x is [T, C]. Of every eight neighbouring features of a row, the `kept` of largest magnitude are
kept. values is [T, C / 8 * kept]; masks is [T, C / 8], uint8, with a bit for each feature: fewer
bytes than an index for each kept number. `filled` puts the numbers into zeros, some rows at a time,
so that no dense copy of x exists.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.codecache import CppCodeCache

__all__ = ["BLOCK", "GRAD_WEIGHT", "PRUNE", "filled"]

BLOCK = 8

# Numbers of a filled piece: they should stay in a cache between filling and product.
_PIECE = 2**19


@cache
def _kernel(name: str) -> Callable[..., None]:
    library = CppCodeCache.load(Path(__file__).with_name("prune.cpp").read_text())
    types = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
    return ctypes.CFUNCTYPE(None, *types)((name, library))


@torch.library.custom_op("saved::prune", mutates_args=(), device_types="cpu")
def _prune(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    values, masks = _fake_prune(x, kept)
    pointers = x.data_ptr(), values.data_ptr(), masks.data_ptr()
    _kernel("prune")(*pointers, masks.numel(), kept, x.element_size())
    return values, masks


@_prune.register_fake
def _fake_prune(x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    blocks = x.shape[1] // BLOCK
    values = x.new_empty(x.shape[0], blocks * kept)
    return values, x.new_empty(x.shape[0], blocks, dtype=torch.uint8)


def filled(values: Tensor, masks: Tensor) -> Tensor:
    """Return the kept numbers in zeros, [T, C]."""
    values, masks = values.contiguous(), masks.contiguous()
    rows, blocks = masks.shape
    x = values.new_empty(rows, blocks * BLOCK)
    kept = values.shape[1] // blocks
    pointers = values.data_ptr(), masks.data_ptr(), x.data_ptr()
    _kernel("fill")(*pointers, masks.numel(), kept, x.element_size())
    return x


@torch.library.custom_op("saved::grad_weight", mutates_args=(), device_types="cpu")
def _grad_weight(grad_output: Tensor, values: Tensor, masks: Tensor) -> Tensor:
    columns = masks.shape[1] * BLOCK
    rows = max(_PIECE // columns, BLOCK)
    result = values.new_zeros(grad_output.shape[1], columns)
    pieces = (tensor.split(rows) for tensor in (grad_output, values, masks))
    for gradient, kept, mask in zip(*pieces, strict=True):
        result.addmm_(gradient.t(), filled(kept, mask))
    return result


@_grad_weight.register_fake
def _fake_grad_weight(grad_output: Tensor, values: Tensor, masks: Tensor) -> Tensor:
    return values.new_empty(grad_output.shape[1], masks.shape[1] * BLOCK)


PRUNE = torch.ops.saved.prune.default
GRAD_WEIGHT = torch.ops.saved.grad_weight.default
