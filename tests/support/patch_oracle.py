"""Gradients of convolutions from averages over patches, position by position."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PatchOracle", "patch_oracle"]


def patch_oracle(layer: nn.Conv2d, x: Tensor, grad: Tensor, r: int) -> list[Tensor]:
    """Return the gradients of input, weight and bias.

    Args:
        layer: the convolution.
        x: its input.
        grad: the gradient of its output.
        r: side of a patch in positions of the output.
    """
    s, groups = layer.stride[0], layer.groups
    dx, dw = torch.zeros_like(x), torch.zeros_like(layer.weight)
    height, width = grad.shape[2:]
    for top in range(0, height, r):
        for left in range(0, width, r):
            patch = grad[:, :, top : top + r, left : left + r]
            count = patch.shape[2] * patch.shape[3]
            mean = patch.sum((2, 3)) / count
            rows = slice(top * s, (top + r) * s), slice(left * s, (left + r) * s)
            inputs = x[:, :, rows[0], rows[1]].mean((2, 3))
            for i in range(layer.kernel_size[0]):
                for j in range(layer.kernel_size[1]):
                    kernel = layer.weight[:, :, i, j]
                    if groups == 1:
                        part = mean @ kernel
                        dw[:, :, i, j] += count * mean.t() @ inputs
                    else:
                        part = mean * kernel[:, 0]
                        dw[:, 0, i, j] += count * (mean * inputs).sum(0)
                    dx[:, :, rows[0], rows[1]] += part[:, :, None, None] / s**2
    return [dx, dw, grad.sum((0, 2, 3))]


class _Patches(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return functional.conv2d(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dx, dw, db = patch_oracle(ctx.layer, x, grad, ctx.layer.r)
        return dx, dw, None if ctx.layer.bias is None else db, None


class PatchOracle(nn.Conv2d):
    """A 1x1 convolution whose gradients are those of patches of r x r."""

    r = 2

    def forward(self, x: Tensor) -> Tensor:
        return _Patches.apply(x, self.weight, self.bias, self)
