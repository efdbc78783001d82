"""Gradients of a 1-D convolution whose output has one gradient in each sample and channel."""

from typing import cast

import torch
from torch import Tensor

from ssprop_passes.kernels.windows import ADD_WINDOWS

__all__ = ["grad_input", "grad_weight"]


def grad_input(
    v: Tensor, x: Tensor, w: Tensor, winners: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    """Return the gradient of the input, [N, C_in, L_in]: the windows of the weight, added up.

    Args:
        v: gradient at the winners, [N, C].
        x: input, [N, C_in, L_in].
        w: weight, [C, C_in, K].
        winners: their positions in the output, [N, C, 1].
        stride: of the convolution.
        padding: of the convolution.
        dilation: of the convolution.
    """
    size, c_in, length = x.shape
    if x.device.type == "cpu":
        return cast(
            Tensor, ADD_WINDOWS(v, w, winners.squeeze(2), length, stride, padding, dilation)
        )
    at = _positions(winners, w.shape[2], stride, padding, dilation)
    is_inside = ((at >= 0) & (at < length)).unsqueeze(1)
    added = torch.where(is_inside, w.permute(1, 0, 2) * v[:, None, :, None], 0)
    at = at.clamp(0, length - 1).reshape(size, 1, -1).expand(size, c_in, -1)
    return torch.zeros_like(x).scatter_add(2, at, added.reshape(size, c_in, -1))


def grad_weight(
    v: Tensor, x: Tensor, w: Tensor, winners: Tensor, stride: int, padding: int, dilation: int
) -> Tensor:
    """Return the gradient of the weight, [C, C_in, K], from the windows that the winners read."""
    size, _, length = x.shape
    at = _positions(winners, w.shape[2], stride, padding, dilation)
    is_inside = ((at >= 0) & (at < length)).unsqueeze(3)
    samples = torch.arange(size, device=x.device)[:, None, None]
    # Rows of channels, so that vectors are read if the channels are innermost in memory.
    read = x.transpose(1, 2)[samples, at.clamp(0, length - 1)]
    return (torch.where(is_inside, read, 0) * v[:, :, None, None]).sum(0).transpose(1, 2)


def _positions(winners: Tensor, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Return the positions in the input that winners read, [N, C, K]; outside of it, padding."""
    taps = torch.arange(kernel, device=winners.device) * dilation
    return winners * stride - padding + taps
