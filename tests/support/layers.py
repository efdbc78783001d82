"""Layers of every kind that a site can be, and a loss for them."""

from torch import Tensor, nn

from ssprop_fx import SparsityConfig
from ssprop_fx.config import TARGETS

EXACT = SparsityConfig(channel_multiple=1, min_channels=1, targets=TARGETS)

# name -> layer, shape of its input
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(6, 12, 3, stride=2), (2, 6, 15)),
    "conv2d": (lambda: nn.Conv2d(3, 10, 3, dilation=2), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 10, 2, padding=1, bias=False), (2, 3, 4, 5, 6)),
    "conv2d, same": (lambda: nn.Conv2d(3, 10, (2, 4), padding="same"), (2, 3, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 20, 3, groups=4), (2, 8, 7, 7)),
    "grouped, 1d": (lambda: nn.Conv1d(8, 20, 3, groups=2), (2, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(10, 10, 3, padding=1, groups=10), (2, 10, 7, 7)),
    "depthwise, multiplied": (lambda: nn.Conv2d(5, 15, 3, stride=2, groups=5), (2, 5, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 10, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(6, 12, 2, groups=3), (2, 6, 5, 5)),
    "transposed, depthwise": (lambda: nn.ConvTranspose1d(6, 12, 2, groups=6), (2, 6, 5)),
    "linear": (lambda: nn.Linear(7, 12), (5, 7)),
    "linear, 3-D": (lambda: nn.Linear(7, 12), (2, 5, 7)),
    "linear, 4-D, no bias": (lambda: nn.Linear(7, 12, bias=False), (2, 3, 4, 7)),
    "one point": (lambda: nn.Conv2d(6, 12, 1), (3, 6, 1, 1)),
}


class Permuted(nn.Module):
    """A linear layer on an input whose last dimension is not contiguous, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)) + self.layer(x.transpose(1, 2).tanh())


class Mixed(nn.Module):
    """A linear layer over the second dimension, so that gradients reach it through a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2).contiguous()


LAYERS["linear, permuted, twice"] = (Permuted, (2, 6, 5))
LAYERS["linear, mixed"] = (Mixed, (2, 6, 5))


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().sum()


def everywhere(module: nn.Module, name: str) -> bool:
    return True
