"""Sites: the backward nodes that can be made sparse, and why the others are not."""

from dataclasses import dataclass

import torch

__all__ = ["MIN_KEEP_COUNT", "Slot"]

# Up to torch 2.11 the fake kernel of a convolution with an unbacked size guards on `u0 > 1`, so
# a keep count of 1 cannot be compiled there.
MIN_KEEP_COUNT = 1 if torch.__version__ >= torch.torch_version.TorchVersion("2.12") else 2


@dataclass(frozen=True)
class Slot:
    """A layer's place in the runtime sparsity tensor.

    Attributes:
        index: position in the model's part of the tensor.
        name: the layer's name, as in `model.named_modules()`.
        channels: its output channels.
    """

    index: int
    name: str
    channels: int
