"""Memory: what sparse backwards have left out so far, one tensor for each call of a layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from ssprop_passes.graph.modes import outside_modes
from torch import Tensor

__all__ = ["Memory", "MemoryInput"]


@dataclass(frozen=True)
class MemoryInput:
    """A memory as an input of a compiled graph.

    Attributes:
        layer: name of the layer that the graph was compiled for.
        call: number of the layer's call in the graph, from 0.
        shape: [C] for a linear layer, [C, *out_space] for a convolution.
        strides: one for each dimension; channels last if the layer's output is.
        dtype: dtype of the gradient, at least float32.
        device: device of the gradient.
    """

    layer: str
    call: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """Return an empty memory: all zeros."""
        empty = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return empty.zero_()


class Memory:
    """What the sparse backwards of a model have left out so far, by layer.

    See `SparsityConfig.memory`. The first call of a graph that needs a tensor makes it, with zeros.
    At later calls the tensor follows its layer's device and dtype. It starts again from zeros if
    its shape changes: for a convolution the shape depends on the resolution, but never on the
    batch size. A layer that one graph calls several times has a tensor for each call. Dense steps
    change nothing.

    Args:
        layers: names of the layers that may have a memory.

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
        """Return the memory of a layer, for a backward to write.

        Args:
            wanted: the memory as an input of the graph.
            layer: name of the layer that the graph is called for.
        """
        key = layer if wanted.call == 0 else f"{layer}@{wanted.call}"
        held = self._tensors.get(key)
        if held is None or not _fits(held, wanted):
            # Under DistributedDataParallel, Dynamo makes the first call itself, on fake tensors.
            with outside_modes():
                made = wanted.zeros()
            if held is not None and held.shape == made.shape:
                made.copy_(held)
            held = self._tensors[key] = made
        # An alias with its own version counter: a backward may, on purpose, write a tensor that
        # another forward has saved for a backward that is still to run.
        return held.data

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors themselves, not copies, by layer name.

        Later calls of a layer in the same graph are numbered, as in `"head@1"`.
        """
        return dict(self._tensors)

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace all memories with copies of the tensors that `state_dict()` returned.

        Args:
            state_dict: the tensors. They may be loaded before the first step or later.

        Raises:
            ValueError: the model has no memory for one of the names.
        """
        unknown = [key for key in state_dict if not self._names & {key, key.rsplit("@", 1)[0]}]
        if unknown:
            raise ValueError(
                f"state_dict must come from the memory of the same model and SparsityConfig:"
                f" the model has none for {', '.join(map(repr, unknown))}"
            )
        self._tensors = {key: tensor.detach().clone() for key, tensor in state_dict.items()}

    def reset(self) -> None:
        """Forget everything."""
        self._tensors = {}


def _fits(tensor: Tensor, wanted: MemoryInput) -> bool:
    found = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return found == (wanted.shape, wanted.strides, wanted.dtype, wanted.device)
