"""Sites: the layers' slots, and what became of each site of a graph."""

from dataclasses import dataclass

import torch
from torch import fx

__all__ = ["MIN_KEEP_COUNT", "SITE_KEY", "Site", "Slot", "Times", "layer_name"]

# Before torch 2.15 Inductor orders strides by guarding on `u0 > 1`, so a keep count of 1 does not
# compile for every kind of site.
MIN_KEEP_COUNT = 1 if torch.__version__ >= torch.torch_version.TorchVersion("2.15") else 2

# Key in `node.meta["custom"]`, which AOTAutograd copies from a forward node to its backward
# nodes. The value is the name of the layer that the node belongs to.
SITE_KEY = "ssprop_layer"


@dataclass(frozen=True)
class Slot:
    """A layer's place in the runtime sparsity tensor.

    Attributes:
        index: position in the model's part of the tensor.
        name: the layer's name, as in `model.named_modules()`.
        channels: its output channels, C.
        groups: number of groups within which channels are selected; the keep count is per group.
    """

    index: int
    name: str
    channels: int
    groups: int = 1


@dataclass(frozen=True)
class Times:
    """Times of one site's backward, in milliseconds.

    Attributes:
        dense: time of the dense backward.
        sparse: time of the sparse backward, which reads grad_output once for the scores and once
            for the gather.
        kept: number of channels that the sparse backward kept, over all groups.
    """

    dense: float
    sparse: float
    kept: int

    def saved(self, kept: int, channels: int) -> float:
        """Return the time saved by keeping `kept` of the site's channels; negative for a loss.

        This assumes that the arithmetic is proportional to the kept channels, and that the rest of
        the sparse backward takes a fixed time.
        """
        return self.dense - self.sparse - self.dense * (kept - self.kept) / channels


@dataclass(frozen=True)
class Site:
    """What became of one site.

    Attributes:
        name: the layer's name; "" if the site belongs to no layer.
        kind: kind of site, such as `conv2d`.
        channels: output channels, C.
        groups: number of groups within which channels are selected.
        flops: FLOPs of the dense backward.
        slot: index in the runtime sparsity tensor; -1 if the site stays dense.
        reason: why it stayed dense; "" if it is sparse.
        sparse_flops: FLOPs of the gradients that became sparse, at full size; 0 if the site stays
            dense.
        times: what the gate measured; None without a gate.
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
        """Return the FLOPs saved by keeping this many channels."""
        return self.sparse_flops * (self.channels - kept) // self.channels

    def saved_ms(self, kept: int) -> float | None:
        """Return the milliseconds saved by keeping this many channels, None if not measured."""
        return None if self.times is None else self.times.saved(kept, self.channels)


def layer_name(node: fx.Node) -> str | None:
    """Return the name of the layer that a node belongs to, None if the node has no mark."""
    name: str | None = (node.meta.get("custom") or {}).get(SITE_KEY)
    return name
