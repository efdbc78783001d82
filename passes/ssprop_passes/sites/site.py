"""Sites: what the pass knows of a backward that it can make sparse, and what became of it."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.selection.error_feedback import NOTHING, Remembered
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.samples import Samples

__all__ = [
    "MIN_KEEP_COUNT",
    "SITE_KEY",
    "Gradients",
    "Site",
    "SiteMatch",
    "Slot",
    "Times",
    "hinted",
    "layer_name",
    "matrix_product_flops",
    "size_hint",
    "why_dense",
]

# Before torch 2.15 Inductor orders strides by guarding on `u0 > 1`, so that a keep count of 1
# cannot be compiled for every kind of site.
MIN_KEEP_COUNT = 1 if torch.__version__ >= torch.torch_version.TorchVersion("2.15") else 2

# Key in `node.meta["custom"]`, which AOTAutograd copies from a forward node to its backward
# nodes, of the name of the layer that the node belongs to.
SITE_KEY = "ssprop_layer"

# Gradients of input, weight and bias; None where not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Slot:
    """A layer's place in the runtime sparsity tensor.

    Attributes:
        index: position in the model's part of the tensor.
        name: the layer's name, as in `model.named_modules()`.
        channels: its output channels, C.
        groups: number of groups that channels are selected in; the keep count is that of one.
    """

    index: int
    name: str
    channels: int
    groups: int = 1


@dataclass(frozen=True)
class Times:
    """Times of one site's backward, in milliseconds.

    Attributes:
        dense: of the dense backward.
        sparse: of the sparse one, with a read of grad_output each for scores and the gather.
        kept: the channels that it kept, of all groups together.
    """

    dense: float
    sparse: float
    kept: int

    def saved(self, kept: int, channels: int) -> float:
        """Return the time saved by keeping `kept` of the site's channels; negative if it is lost.

        The arithmetic is taken to be in proportion to the channels kept, the rest of the sparse
        backward's time to be fixed.
        """
        return self.dense - self.sparse - self.dense * (kept - self.kept) / channels


@dataclass(frozen=True)
class Site:
    """What became of one site.

    Attributes:
        name: the layer's name, "" where the site belongs to none.
        kind: such as `conv2d`.
        channels: output channels, C; where samples are chosen, those of the batch.
        groups: number of groups that channels are selected in.
        flops: floating-point operations of the dense backward.
        slot: index in the runtime sparsity tensor, -1 for a site left dense.
        reason: why it was left dense, "" for a sparse one.
        sparse_flops: those of `flops` that its sparse gradients take at full size; 0 for a site
            left dense.
        times: what the gate measured, None without a gate.
    """

    name: str
    kind: str
    channels: int
    groups: int
    flops: int
    slot: int = -1
    reason: str = ""
    sparse_flops: int = 0
    times: Times | None = None

    def saved_flops(self, kept: int) -> int:
        """Return the operations that are left out where so many channels are kept."""
        return self.sparse_flops * (self.channels - kept) // self.channels

    def saved_ms(self, kept: int) -> float | None:
        """Return the milliseconds saved where so many are kept, None where not measured."""
        return None if self.times is None else self.times.saved(kept, self.channels)


class SiteMatch(ABC):
    """A backward node, or group of nodes, that a kind of site recognised.

    A kind of site is a subclass in a file of its own, with a function `match_x(node)` that
    returns an instance or None, listed in `ssprop_passes.sites.matchers`.

    Attributes:
        node: the first of `nodes`: the replacement is inserted before it, with its metadata.
    """

    node: fx.Node

    @property
    @abstractmethod
    def kind(self) -> str:
        """A short name, such as `conv2d`."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Output channels, C."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """Number of groups that channels are selected in."""

    @property
    @abstractmethod
    def wanted(self) -> tuple[bool, bool, bool]:
        """Which of the gradients of input, weight and bias are computed."""

    @abstractmethod
    def flops_of(self, mask: Sequence[bool]) -> int:
        """Return the floating-point operations, two a multiply-add, of dense gradients.

        Args:
            mask: which of those of input, weight and bias to count.
        """

    @property
    @abstractmethod
    def nodes(self) -> Sequence[fx.Node]:
        """The nodes that compute the dense gradients of input and weight."""

    @property
    @abstractmethod
    def inputs(self) -> Sequence[fx.Node]:
        """The nodes that `backward` takes the values of."""

    @property
    @abstractmethod
    def dense_gradients(self) -> Gradients:
        """The fake values of the dense gradients that are replaced."""

    @abstractmethod
    def backward(
        self, k: int, selection: Selection, *tensors: Tensor, memory: Remembered = NOTHING
    ) -> Gradients:
        """Return the sparse gradients, None for the others: plain torch, which the pass traces.

        Args:
            k: keep count of each group; may be a SymInt.
            selection: which channels are kept, and which gradients are sparse.
            tensors: values of `inputs`.
            memory: what earlier steps left behind, updated in place; see
                `ssprop_passes.selection.error_feedback`.
        """

    def backward_of_parts(
        self, k: int, selection: Selection, *tensors: Tensor, memory: Remembered = NOTHING
    ) -> Gradients:
        """Return what `backward` does, each gradient of the channels with its own score."""
        parts = [part for part in selection.parts if any(part.sparse(self.wanted))]
        weight, *input_ = [self.backward(k, part, *tensors, memory=memory) for part in parts]
        return weight if not input_ else (input_[0][0], *weight[1:])

    @abstractmethod
    def backward_of_samples(
        self, samples: Samples, selection: Selection, *tensors: Tensor
    ) -> Gradients:
        """Return the gradients made of some samples, None for those that stay dense.

        Args:
            samples: the samples.
            selection: says which gradients are sparse.
            tensors: values of `inputs`.
        """

    @abstractmethod
    def replace(self, gradients: Sequence[fx.Node | None]) -> None:
        """Let the users of the dense gradients use these, and erase what has become dead.

        Where there is None, what computes the dense gradient stays, marked with `INSERTED_KEY`.
        """

    @property
    def form(self) -> Hashable:
        """What `backward` depends on besides its arguments, None where that is not told.

        Sites that are alike in this and in the form of their inputs are traced once.
        """
        return None

    @property
    def flops(self) -> int:
        """Floating-point operations of the dense backward."""
        return self.flops_of(self.wanted)


def layer_name(node: fx.Node) -> str | None:
    """Return the name of the layer that a node belongs to, None where it was not marked."""
    name: str | None = (node.meta.get("custom") or {}).get(SITE_KEY)
    return name


def why_dense(
    match: SiteMatch,
    name: str | None,
    slots: Mapping[str, Slot],
    excluded: Mapping[str, str],
    selection: Selection,
) -> str:
    """Return why a site stays dense, "" if it can be made sparse.

    Args:
        match: the site.
        name: its layer's name.
        slots: the layers that take part, by name.
        excluded: the layers that do not, by name, with the reason.
        selection: says which gradients are sparse.
    """
    if name is None:
        return "outside the model's modules"
    if name in excluded:
        return excluded[name]
    if name not in slots:
        return "its module owns no weight of this kind"
    if (slots[name].channels, slots[name].groups) != (match.channels, match.groups):
        return "its weight is not that of its module"
    if not any(selection.sparse(match.wanted)):
        return f"it computes no {selection.gradients} gradient"
    return ""


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
