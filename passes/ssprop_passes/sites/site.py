"""Sites: the layers' slots, and what became of each site of a graph."""

from dataclasses import dataclass

import torch
from torch import fx

__all__ = ["MIN_KEEP_COUNT", "SITE_KEY", "Site", "Slot", "Times", "layer_name"]

# Before torch 2.15 Inductor orders strides by guarding on `u0 > 1`, so that a keep count of 1
# cannot be compiled for every kind of site.
MIN_KEEP_COUNT = 1 if torch.__version__ >= torch.torch_version.TorchVersion("2.15") else 2

# Key in `node.meta["custom"]`, which AOTAutograd copies from a forward node to its backward
# nodes, of the name of the layer that the node belongs to.
SITE_KEY = "ssprop_layer"


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


def layer_name(node: fx.Node) -> str | None:
    """Return the name of the layer that a node belongs to, None where it was not marked."""
    name: str | None = (node.meta.get("custom") or {}).get(SITE_KEY)
    return name
