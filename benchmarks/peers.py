"""A peer: ssProp by module swap, like its published code (arXiv 2408.12561).

A module replaces each ungrouped `nn.Conv2d` in a copy of the model. In the backward, the module's
autograd.Function computes

    idx = topk(mean(abs(grad_output), (0, 2, 3)), k)
    grad_input, rows, grad_bias = convolution_backward(grad_output[:, idx], input, weight[idx])
    grad_weight = zeros; grad_weight[idx] = rows

with k a Python int. This is our code, without two faults of the published code: the weight's
gradient respects dilation, and autocast applies. Grouped convolutions, which the published code
gets wrong, stay unchanged.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssprop_fx.scheduling.keep_counts import keep_count

__all__ = ["TopKConv2d", "is_swappable", "swap_convs"]


class TopKConvFunction(torch.autograd.Function):
    """A convolution whose backward keeps the k strongest channels of grad_output."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        k: int,
    ) -> Tensor:
        """Return the convolution of `input`, [N, C_in, H, W]."""
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, dilation
        ctx.has_bias, ctx.k = bias is not None, k
        return functional.conv2d(input, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias."""
        input, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        indices = torch.topk(grad_output.abs().mean((0, 2, 3)), ctx.k).indices
        grad_input, rows, kept_bias = torch.ops.aten.convolution_backward(
            grad_output[:, indices],
            input,
            weight[indices],
            [ctx.k] if ctx.has_bias else None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            1,
            [ctx.needs_input_grad[0], True, ctx.has_bias],
        )
        grad_weight = torch.zeros_like(weight)
        grad_weight[indices] = rows
        grad_bias = None
        if ctx.has_bias:
            grad_bias = kept_bias.new_zeros(weight.shape[0])
            grad_bias[indices] = kept_bias
        return grad_input, grad_weight, grad_bias, None, None, None, None


class TopKConv2d(nn.Conv2d):
    """Replaces an `nn.Conv2d` and uses its parameters.

    Args:
        conv: a convolution for which `is_swappable` is true.
        k: keep count, in [1, C].
    """

    def __init__(self, conv: nn.Conv2d, k: int) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.k = k

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input`, [N, C_in, H, W]."""
        tensors = [input, self.weight, self.bias]
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            # Cast here, not in the function, which must save the tensors that it used.
            dtype = torch.get_autocast_dtype(device_type)
            tensors = [None if t is None else t.to(dtype) for t in tensors]
        geometry = self.stride, self.padding, self.dilation
        return TopKConvFunction.apply(*tensors, *geometry, self.k)


def is_swappable(module: nn.Module) -> bool:
    """Return whether a module is a plain, ungrouped `nn.Conv2d`."""
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def swap_convs(model: nn.Module, drop_rate: float) -> nn.Module:
    """Return a copy of a model with its convolutions swapped; the model stays unchanged.

    Args:
        model: the model.
        drop_rate: fraction in [0, 1); keep counts follow the published code's rule,
            `max(int(share_kept * C), 1)`.

    Returns:
        The copy, with copies of the model's weights.

    Raises:
        ValueError: the model has no convolution to swap.
    """
    swapped = copy.deepcopy(model)
    found = [name for name, module in swapped.named_modules() if is_swappable(module)]
    if not found:
        raise ValueError("model must have an ungrouped nn.Conv2d for the module swap, but has none")
    if found == [""]:
        return TopKConv2d(swapped, keep_count(swapped.out_channels, drop_rate))
    for name in found:
        conv = swapped.get_submodule(name)
        swapped.set_submodule(name, TopKConv2d(conv, keep_count(conv.out_channels, drop_rate)))
    return swapped
