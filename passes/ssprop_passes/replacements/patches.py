"""Patches: the gradients of a 1x1 convolution from averages over patches of its positions.

This is gradient filtering (Yang, Li, Marculescu, CVPR 2023) for 1x1 convolutions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ssprop_passes.replacements.gradients import Gradients

__all__ = ["patch_averages", "patch_gradients", "patch_sizes", "spread_patches"]


def patch_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, side: int, output_mask: Sequence[bool]
) -> Gradients:
    """Return the gradients of a 1x1 convolution of stride 1, as if patches were constant.

    `grad_output` and `input` are replaced by their averages over each patch. So the gradient of the
    input has one value in each patch, and both products shrink by `side**2`. Its sum over a patch
    is exact. The gradient of the weight is exact where `grad_output` or `input` is constant in each
    patch; elsewhere it is biased. That of the bias is exact.

    Args:
        grad_output: [N, C, H, W].
        input: [N, C_in, H, W].
        weight: [C, C_in, 1, 1].
        side: height and width of a patch; patches at the far edges may be smaller.
        output_mask: which of the gradients of input, weight and bias are wanted.

    Returns:
        Gradients of input, weight and bias, None if not wanted.
    """
    space = grad_output.shape[2:]
    averages = patch_averages(grad_output, side)
    counts = patch_sizes(space, side, grad_output)
    grad_input = grad_weight = None
    if output_mask[0]:
        rows = averages.flatten(0, 2) @ weight.flatten(1)
        grad_input = spread_patches(rows.view(*averages.shape[:3], -1), side, space)
    if output_mask[1]:
        sums = (averages * counts).flatten(0, 2)
        grad_weight = (sums.t() @ patch_averages(input, side).flatten(0, 2)).view(weight.shape)
    return grad_input, grad_weight, grad_output.sum((0, 2, 3)) if output_mask[2] else None


def patch_averages(x: Tensor, side: int) -> Tensor:
    """Return averages over patches, [N, h, w, C], of [N, C, H, W]."""
    return functional.avg_pool2d(x, side, ceil_mode=True).permute(0, 2, 3, 1)


def patch_sizes(space: Sequence[int], side: int, like: Tensor) -> Tensor | int:
    """Return how many positions each patch has, [h, w, 1]."""
    if all(size % side == 0 for size in space):
        return side**2
    height, width = (
        (size - torch.arange(0, size, side, device=like.device)).clamp(max=side) for size in space
    )
    return (height[:, None] * width).to(like.dtype)[..., None]


def spread_patches(x: Tensor, side: int, space: Sequence[int]) -> Tensor:
    """Return [N, C, H, W] in channels last: each value of [N, h, w, C] on its whole patch."""
    n, h, w, channels = x.shape
    spread = x[:, :, None, :, None].expand(n, h, side, w, side, channels)
    whole = spread.reshape(n, h * side, w * side, channels)
    return whole[:, : space[0], : space[1]].permute(0, 3, 1, 2)
