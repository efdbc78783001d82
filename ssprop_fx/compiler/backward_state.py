"""Memory: what sparse backwards have left out so far, a tensor for each call of a layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from ssprop_passes.graph.modes import outside_modes
from torch import Tensor

__all__ = ["Memory", "MemoryInput"]


@dataclass(frozen=True)
class MemoryInput:
    """A memory as a compiled graph takes it.

    Attributes:
        layer: name of the layer that the graph was compiled for.
        call: number of the layer's call in the graph, from 0.
        shape: [C] for a linear layer, [C, *out_space] for a convolution.
        strides: of the same length; channels lie last where they do in the layer's output.
        dtype: that of the gradient, at least float32.
        device: that of the gradient.
    """

    layer: str
    call: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """Return a memory of nothing."""
        empty = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return empty.zero_()


class Memory:
    """What the sparse backwards of a model remember, by layer.

    That is what they have left out so far (`SparsityConfig.memory`). A tensor is made when a graph
    that needs it is first called, follows its layer's device and dtype at the next call, and is
    zero at first and where its shape has changed: what a convolution has left out is bound to the
    resolution, nothing to the batch size. A layer that one graph calls several times has a tensor
    for each call. Dense steps leave all as they are.

    Args:
        layers: names of the layers that may have one.

    Examples:
        >>> from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
        >>> config = SparsityConfig(memory=0.9)
        >>> scheduler = SparsityScheduler(constant(0.5))
        >>> layers = torch.nn.Sequential(torch.nn.Linear(8, 64))
        >>> model = ssprop_compile(layers, scheduler, config=config, backend="aot_eager")
        >>> model(torch.randn(4, 8)).square().sum().backward()
        >>> {name: tensor.shape for name, tensor in model.ssprop.memory.state_dict().items()}
        {'0': torch.Size([64])}
    """

    def __init__(self, layers: Iterable[str] = ()) -> None:
        self._names = frozenset(layers)
        self._tensors: dict[str, Tensor] = {}

    def find(self, wanted: MemoryInput, layer: str) -> Tensor:
        """Return the memory of a layer, to be written by a backward.

        Args:
            wanted: the memory as the graph takes it.
            layer: name of the layer that the graph is called for.
        """
        key = layer if wanted.call == 0 else f"{layer}@{wanted.call}"
        held = self._tensors.get(key)
        if held is None or not _fits(held, wanted):
            # Under DistributedDataParallel, Dynamo itself makes the first call, on fake tensors.
            with outside_modes():
                made = wanted.zeros()
            if held is not None and held.shape == made.shape:
                made.copy_(held)
            held = self._tensors[key] = made
        # An alias with a version counter of its own: a backward writes what another forward, whose
        # backward is yet to come, has saved, and is meant to.
        return held.data

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors themselves, by name of the layer.

        Calls of a layer after the first are numbered, as in `"head@1"`.
        """
        return dict(self._tensors)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Put copies of the tensors that `state_dict()` returned in place of all there are.

        Args:
            state_dict: the tensors; before the first step as well as later.

        Raises:
            ValueError: the model has no memory for one of the names.
        """
        unknown = [key for key in state_dict if not self._names & {key, key.rsplit("@", 1)[0]}]
        if unknown:
            raise ValueError(
                f"state_dict must come from the memory of the same model and SparsityConfig:"
                f" this one has none for {', '.join(map(repr, unknown))}"
            )
        self._tensors = {key: tensor.detach().clone() for key, tensor in state_dict.items()}

    def reset(self) -> None:
        """Forget everything."""
        self._tensors = {}


def _fits(tensor: Tensor, wanted: MemoryInput) -> bool:
    found = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return found == (wanted.shape, wanted.strides, wanted.dtype, wanted.device)
