"""The batch of a graph: the input that holds it, and the symbol of its size.

A sliced backward needs the batch size as a symbol. Dynamo makes a size constant unless it is marked
as dynamic, so the backend marks it and lets Dynamo trace again.

Private torch: Dynamo's marks on tensors.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from ssprop_passes.graph.batch_dim import size_expr
from ssprop_passes.sites.flops import size_hint
from torch import Tensor, fx, nn

from ssprop_fx.compiler.dynamo_graph import input_sizes, is_fake
from ssprop_fx.compiler.inductor import RestartAnalysis

__all__ = ["MARK", "BatchInput", "batch_marked", "find_batch_input"]

# What Dynamo treats as dynamic without a guard on the mark itself.
_IS_NEW = torch.__version__ >= torch.torch_version.TorchVersion("2.14")
MARK = "_dynamo_propagated_dynamic_indices" if _IS_NEW else "_dynamo_weak_dynamic_indices"


@dataclass(frozen=True)
class BatchInput:
    """Where a graph takes the batch from.

    Attributes:
        position: position of the input.
        dim: the dimension that is the batch.
        symbol: the symbol of its size.
    """

    position: int
    dim: int
    symbol: sympy.Symbol


def find_batch_input(
    gm: fx.GraphModule, inputs: Sequence[Any], model: nn.Module, size: int
) -> BatchInput | None:
    """Return the input that holds the batch; None for one sample or none: it cannot be smaller.

    Args:
        gm: the graph that Dynamo captured.
        inputs: its example inputs.
        model: the model; its parameters and buffers are inputs as well, and are skipped.
        size: samples in the batch; 0 if not known: then the batch is the leading dimension of the
            first tensor that has more than one entry there.

    Raises:
        RestartAnalysis: the size is a constant of the graph. It is marked as dynamic now, so Dynamo
            must trace again.
        ValueError: no input holds the batch, or the model makes its size a constant.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found = [
        (position, value)
        for position, value in enumerate(inputs)
        if isinstance(value, Tensor) and value.ndim and id(value) not in own
    ]
    if not found:
        raise ValueError("the graph has no input for the batch")
    size = size or _batch_size([value for _, value in found])
    if size == 1:
        return None
    places = [
        (position, dim)
        for position, value in found
        for dim, length in enumerate(value.shape)
        if size_hint(length) == size
    ]
    if not places:
        raise ValueError(f"no input of the graph has a dimension for the batch of {size}")
    # The leading dimension if any input has it there.
    position, dim = min(places, key=lambda place: place[1] != 0)
    length = input_sizes(gm, position)[dim]
    symbol = size_expr(length)
    if isinstance(symbol, sympy.Symbol):
        return BatchInput(position, dim, symbol)
    tensors = [value for _, value in found if not is_fake(value)]
    if _mark(tensors, size):
        raise RestartAnalysis
    raise ValueError(
        f"the model makes the batch size a constant, {size}: it may compare the size with a number"
    )


@contextmanager
def batch_marked(leaves: Iterable[Any]) -> Iterator[None]:
    """Mark the batch of a call's arguments as dynamic, for a compile in the `with` block.

    The marks go afterwards: the dense variant must not see them.
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    before = [getattr(tensor, MARK, None) for tensor in tensors]
    _mark(tensors, _batch_size(tensors))
    try:
        yield
    finally:
        for tensor, mark in zip(tensors, before, strict=True):
            if mark is not None:
                setattr(tensor, MARK, mark)
            elif hasattr(tensor, MARK):
                delattr(tensor, MARK)


def _batch_size(tensors: Iterable[Tensor]) -> int:
    """Return the first leading dimension above 1, 1 if there is none."""
    return next((size for x in tensors if (size := size_hint(x.shape[0])) > 1), 1)


def _mark(tensors: Iterable[Tensor], size: int) -> bool:
    """Mark the first dimension of this size in each tensor; return whether any mark is new."""
    is_new = False
    for tensor in tensors:
        dim = next((d for d, length in enumerate(tensor.shape) if length == size), None)
        known: set[int] = getattr(tensor, MARK, set())
        if dim is not None and size > 1 and dim not in known:
            setattr(tensor, MARK, {*known, dim})
            is_new = True
    return is_new
