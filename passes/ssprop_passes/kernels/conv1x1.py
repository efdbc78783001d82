"""Gradients of a 1x1 convolution on a CPU, which need not know where an image ends.

oneDNN processes one image at a time, so small images leave its last vectors and blocks partly
empty. Here all positions that a batch uses (a stride skips some) form one image or, in bfloat16,
the rows of matrices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["conv1x1_backward", "is_conv1x1"]

aten = torch.ops.aten


def is_conv1x1(
    grad_output: Tensor, input: Tensor, weight: Tensor, padding: Sequence[int], groups: int
) -> bool:
    """Say whether `conv1x1_backward` takes these tensors, and is at least as fast as ATen.

    It is, as measured, in float32 without AVX-512, and in bfloat16 if the processor computes in it.
    """
    return (
        max(weight.shape[2:]) == 1
        and max(padding) == 0
        and groups == 1
        and input.device.type == "cpu"
        and input.dtype == grad_output.dtype == weight.dtype
        and _is_measured(input.dtype)
        and grad_output.numel() > 0
        and grad_output.movedim(1, -1).is_contiguous()
        and input.movedim(1, -1).is_contiguous()
    )


def _is_measured(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"


def conv1x1_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of input and weight, None if not wanted.

    Args:
        grad_output: [N, C, *out_space], channels last.
        input: [N, C_in, *space], channels last.
        weight: [C, C_in, 1, ...], a 1 per spatial dimension.
        stride: one entry per spatial dimension.
        output_mask: which of the two are wanted.
    """
    at = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    sources = input[at].movedim(1, -1)
    backward = _by_products if input.dtype == torch.bfloat16 else _by_one_image
    grad_input, grad_weight = backward(
        grad_output.movedim(1, -1).flatten(1, -2),
        sources.flatten(1, -2).contiguous(),
        weight.flatten(1),
        output_mask,
    )
    if grad_input is not None:
        grad_input = grad_input.reshape(sources.shape).movedim(-1, 1)
        if max(stride) > 1:
            whole = torch.zeros_like(input)
            whole[at] = grad_input
            grad_input = whole
    return grad_input, None if grad_weight is None else grad_weight.reshape(weight.shape)


def _by_products(
    dy: Tensor, x: Tensor, weight: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x, [N, positions, C_in], and of weight, [C, C_in]."""
    dy = dy.flatten(0, 1)
    grad_x = dy @ weight if output_mask[0] else None
    return grad_x, dy.t() @ x.flatten(0, 1) if output_mask[1] else None


def _by_one_image(
    dy: Tensor, x: Tensor, weight: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the same as `_by_products`."""
    grad_x, grad_weight, _ = aten.convolution_backward(
        dy[None].movedim(-1, 1),
        x[None].movedim(-1, 1),
        weight[:, :, None, None],
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [*output_mask, False],
    )
    return None if grad_x is None else grad_x.movedim(1, -1), grad_weight
