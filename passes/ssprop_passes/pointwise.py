"""Gradients of a 1x1 convolution, on a CPU: which positions make an image does not matter to them.

oneDNN takes one image at a time, and where images are small its vectors and blocks are not full at
their ends. Here all positions of a batch are one image, of those that a stride leaves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["is_pointwise", "pointwise_backward"]

aten = torch.ops.aten


def is_pointwise(
    grad_output: Tensor, input: Tensor, weight: Tensor, padding: Sequence[int], groups: int
) -> bool:
    """Say whether `pointwise_backward` takes these tensors, and is as fast as ATen.

    That was measured in float32 and without AVX-512.
    """
    return (
        max(weight.shape[2:]) == 1
        and max(padding) == 0
        and groups == 1
        and input.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
        and input.dtype == grad_output.dtype == torch.float32
        and grad_output.numel() > 0
        and grad_output.movedim(1, -1).is_contiguous()
        and input.movedim(1, -1).is_contiguous()
    )


def pointwise_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of input and weight, None where not wanted.

    Args:
        grad_output: [N, C, *out_space], channels last.
        input: [N, C_in, *space], channels last.
        weight: [C, C_in, 1, ...], a 1 for each dimension of space.
        stride: one entry a dimension of space.
        output_mask: which of the two are wanted.
    """
    at = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    sources = input[at]
    grad_input, grad_weight, _ = aten.convolution_backward(
        _one_image(grad_output),
        _one_image(sources),
        weight.flatten(1)[:, :, None, None],
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [*output_mask, False],
    )
    if output_mask[0]:
        grad_input = grad_input.movedim(1, -1).reshape(sources.movedim(1, -1).shape).movedim(-1, 1)
        if max(stride) > 1:
            whole = torch.zeros_like(input)
            whole[at] = grad_input
            grad_input = whole
    return grad_input, grad_weight.reshape(weight.shape) if output_mask[1] else None


def _one_image(x: Tensor) -> Tensor:
    """Return [N, C, *space] as [1, C, N, positions], channels last."""
    return x.movedim(1, -1).flatten(1, -2).contiguous()[None].movedim(-1, 1)
