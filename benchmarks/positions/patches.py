"""Patches: the gradients of a convolution from averages over patches of r x r positions.

This is gradient filtering (Yang et al., CVPR 2023). With s the stride, of a kernel w:

    before    dx, dw = convolution_backward(dy, x, w)
    after     dy = avg_pool(dy, r), x = avg_pool(x, r * s)
              dx = upsample(conv1x1(dy, sum(w, (2, 3))), r * s) / s^2
              dw[..., i, j] = sum(dy * x * positions of the patch), the same for all i, j

Both gradients are biased, unless gradient or input is constant within patches. A depthwise layer
multiplies in place of the 1x1 convolution. The published code leaves the division by s^2 out, of
both gradients; with it the sum of the input gradient is right. Other grouped layers stay dense.
"""

from typing import Any, cast

import torch
from ssprop_passes.replacements.patches import patch_averages, patch_sizes, spread_patches
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PatchConv2d", "is_patch_conv", "swap_patches"]


class _PatchConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: tuple[int, int],
        groups: int,
        r: int,
    ) -> Tensor:
        output = functional.conv2d(input, weight, bias, stride, padding, 1, groups)
        # The averages are all that the backward needs of the input.
        ctx.save_for_backward(patch_averages(input, r * stride), weight)
        ctx.geometry = r, stride, groups, tuple(input.shape[2:])
        ctx.has_bias = bias is not None
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        averages, weight = ctx.saved_tensors
        r, stride, groups, size = ctx.geometry
        kernel, window = weight.sum((2, 3)), weight.shape[2] * weight.shape[3]
        grad = patch_averages(grad_output, r)
        totals = grad * patch_sizes(grad_output.shape[2:], r, grad_output)
        if groups == 1:
            sums = totals.flatten(0, 2).t() @ averages.flatten(0, 2)
        else:
            sums = (totals * averages).sum((0, 1, 2))[:, None]
        grad_input = None
        if ctx.needs_input_grad[0]:
            grad = grad @ kernel if groups == 1 else grad * kernel[:, 0]
            grad_input = spread_patches(grad / stride**2, r * stride, size)
        grad_weight = sums[:, :, None, None]
        if window > 1:
            grad_weight = grad_weight.expand_as(weight).contiguous()
        grad_bias = grad_output.sum((0, 2, 3)) if ctx.has_bias else None
        return grad_input, grad_weight, grad_bias, None, None, None, None


class PatchConv2d(nn.Conv2d):
    """A convolution whose gradients are of averages over patches.

    Attributes:
        r: side of a patch in positions of the output.
    """

    r = 1

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the layer."""
        stride, padding = self.stride[0], cast(tuple[int, int], self.padding)
        arguments = (self.weight, self.bias, stride, padding, self.groups, self.r)
        return cast(Tensor, _PatchConv.apply(input, *arguments))


def is_patch_conv(module: nn.Module) -> bool:
    """Say whether a module is a convolution that patches suit."""
    if type(module) is not nn.Conv2d:
        return False
    kernel, stride, padding = module.kernel_size, module.stride, module.padding
    # Patches of output and input lie on one another.
    is_aligned = kernel == stride or padding == tuple((side - 1) // 2 for side in kernel)
    return (
        is_aligned
        and stride[0] == stride[1]
        and module.dilation == (1, 1)
        and (module.groups == 1 or module.groups == module.in_channels == module.out_channels)
    )


def swap_patches(model: nn.Module, r: int, only_1x1: bool = False) -> nn.Module:
    """Make a model's convolutions take patches; names and tensors stay.

    Args:
        model: the model; it is changed.
        r: side of a patch in positions of the output.
        only_1x1: whether other kernels stay dense.

    Returns:
        The model.
    """
    for module in model.modules():
        if is_patch_conv(module) and not (only_1x1 and module.kernel_size != (1, 1)):
            module.__class__ = PatchConv2d
            module.r = r  # type: ignore[assignment]
    return model
