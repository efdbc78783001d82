"""Memory: what sparse backwards remember, a tensor or two a call of a layer."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from ssprop_passes.selection.error_feedback import MEMORY_KEY
from ssprop_passes.selection.policy import is_channels_last
from ssprop_passes.sites.site import layer_name
from torch import Tensor, fx
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from ssprop_fx.compiler.slots import SlotTable

__all__ = ["LAYER_CALLS", "Memory", "MemoryInput", "mark_memories"]

# What takes the weight of a layer in the graph that Dynamo captures.
LAYER_CALLS = (
    functional.linear,
    *(getattr(functional, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
)


@dataclass(frozen=True)
class MemoryInput:
    """A memory as a compiled graph takes it.

    Attributes:
        layer: name of the layer that the graph was compiled for.
        call: number of the layer's call in the graph, from 0.
        field: that of `Remembered`.
        shape: [C] for a linear layer and for scores, [C, *out_space] for a convolution.
        strides: of the same length; channels lie last where they do in the layer's output.
        dtype: that of the gradient, at least float32.
        device: that of the gradient.
    """

    layer: str
    call: int
    field: str
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

    That is what they have left out so far (`SparsityConfig.memory`), the average of their scores
    (`SparsityConfig.score_decay`), or both. A tensor is made when a graph that needs it is first
    called, follows its layer's device and dtype at the next call, and is zero at first and where
    its shape has changed: what a convolution has left out is bound to the resolution, nothing to
    the batch size. A layer that one graph calls several times has a tensor for each call. Dense
    steps leave all as they are.

    Args:
        layers: names of the layers that may have one.
        fields: those of `Remembered` that they have.

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

    def __init__(self, layers: Iterable[str] = (), fields: Sequence[str] = ("left_out",)) -> None:
        self._names = {_name(layer, field) for layer in layers for field in fields}
        self._tensors: dict[str, Tensor] = {}

    def find(self, wanted: MemoryInput, layer: str) -> Tensor:
        """Return the memory of a layer, to be written by a backward.

        Args:
            wanted: the memory as the graph takes it.
            layer: name of the layer that the graph is called for.
        """
        name = _name(layer, wanted.field)
        key = name if wanted.call == 0 else f"{name}@{wanted.call}"
        held = self._tensors.get(key)
        if held is None or not _fits(held, wanted):
            # Under DistributedDataParallel, Dynamo itself makes the first call, on fake tensors.
            with _disable_current_modes():
                made = wanted.zeros()
            if held is not None and held.shape == made.shape:
                made.copy_(held)
            held = self._tensors[key] = made
        # An alias with a version counter of its own: a backward writes what another forward, whose
        # backward is yet to come, has saved, and is meant to.
        return held.data

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors themselves, by name of the layer.

        Averages of scores are under `"head:scores"`. Calls of a layer but the first are numbered,
        as in `"head@1"` and `"head:scores@1"`.
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


def mark_memories(gm: fx.GraphModule, table: SlotTable, fields: Sequence[str]) -> list[MemoryInput]:
    """Number the calls of layers with a slot, and write the numbers into their metadata.

    Args:
        gm: the graph that Dynamo captured, marked by `mark_layers`; subgraphs are marked as well.
        table: the model's slots.
        fields: those of `Remembered` that each call has.

    Returns:
        The memories, those of each call one after another. Sizes of theirs that Dynamo takes for
        dynamic are fixed, with a guard.
    """
    slots = {slot.name for slot in table.slots}
    calls: Counter[str] = Counter()
    memories: list[MemoryInput] = []
    for graph_module in gm.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, fx.GraphModule) else ():
            name = layer_name(node)
            output = node.meta.get("example_value")
            if (
                name not in slots
                or node.target not in LAYER_CALLS
                or not isinstance(output, Tensor)
            ):
                continue
            node.meta["custom"][MEMORY_KEY] = calls.total()
            memories += [_memory_of(output, node.target, name, calls[name], f) for f in fields]
            calls[name] += 1
    return memories


def _memory_of(output: Tensor, call: object, layer: str, number: int, field: str) -> MemoryInput:
    """Return a memory of a call, given the fake value of its output."""
    if call is functional.linear:
        dims = [-1]
    else:
        # A single sample may come without a batch dimension.
        spatial = next(n for n in (1, 2, 3) if f"{n}d" in getattr(call, "__name__", ""))
        dims = list(range(-1 - spatial, 0))
    if field == "scores":
        dims = dims[:1]
    shape = tuple(int(output.shape[dim]) for dim in dims)
    order = [*range(1, len(shape)), 0] if is_channels_last(output) else range(len(shape))
    strides, step = [1] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= shape[dim]
    dtype = torch.promote_types(output.dtype, torch.float32)
    return MemoryInput(layer, number, field, shape, tuple(strides), dtype, output.device)


def _name(layer: str, field: str) -> str:
    """Return what a layer's memory of its first call is called."""
    return layer if field == "left_out" else f"{layer}:{field}"


def _fits(tensor: Tensor, wanted: MemoryInput) -> bool:
    found = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return found == (wanted.shape, wanted.strides, wanted.dtype, wanted.device)
