"""The weight's gradient of a grouped convolution from few kept channels a group, on a CPU.

oneDNN's vectors hold the output channels of one group. Of 16, three or four are kept, and this
gradient takes hardly less time than the dense one. Here vectors hold input channels, and the time
goes with the channels kept: `grouped_grad_weight.cpp`.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssprop_passes.native import COUNT, POINTER, kernel_maybe

__all__ = ["grouped_grad_weight", "grouped_kernel_maybe"]

# More kept channels than these in a group, without and with a stride, and oneDNN is faster.
_MAX_KEPT, _MAX_KEPT_STRIDED = 4, 8

# With vectors of eight, oneDNN is also faster where rows of grad_output are shorter than this.
_MIN_WIDTH = 1 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 28

# The kernel's narrowest vector, in input channels of a group.
_LANES = 4


def grouped_kernel_maybe(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], groups: int
) -> Callable[..., None] | None:
    """Return the kernel for `grouped_grad_weight`; None where ATen is to compute the gradient.

    That is for tensors the kernel does not take, where ATen is faster, and, after a warning, where
    the kernel does not compile.
    """
    kept, sources = weight.shape[0] // groups, weight.shape[1]
    is_strided = any(step > 1 for step in stride)
    is_suited = (
        kept <= (_MAX_KEPT_STRIDED if is_strided else _MAX_KEPT)
        and kept < sources
        and sources % _LANES == 0
        and grad_output.ndim == 4
        and grad_output.shape[3] >= _MIN_WIDTH
        and input.device.type == "cpu"
        and input.dtype == grad_output.dtype
        and input.dtype in (torch.float32, torch.bfloat16)
        and input.is_contiguous(memory_format=torch.channels_last)
        and grad_output.is_contiguous(memory_format=torch.channels_last)
    )
    if not is_suited:
        return None
    return kernel_maybe("grouped_grad_weight", *[POINTER] * 4, COUNT, COUNT)


def grouped_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    kernel: Callable[..., None],
) -> Tensor:
    """Return the weight's gradient of a grouped 2-D convolution, summed in single precision.

    Args:
        grad_output: [N, C, H_out, W_out], float32 or bfloat16, channels last.
        input: [N, C_in, H, W], as grad_output.
        weight: [C, C_in / groups, *kernel], only for its shape and dtype; C_in / groups a multiple
            of four.
        stride: one entry a spatial dimension.
        padding: one entry a spatial dimension.
        dilation: one entry a spatial dimension.
        groups: number of groups.
        kernel: what `grouped_kernel_maybe` returns.

    Returns:
        The gradient, of the weight's shape and dtype, channels last.
    """
    sizes = [input.shape[0], groups, weight.shape[0] // groups, weight.shape[1]]
    spaces = [*input.shape[2:], *grad_output.shape[2:], *weight.shape[2:]]
    shape = [*sizes, *spaces, *stride, *padding, *dilation]
    out = torch.empty(weight.shape, dtype=torch.float32, memory_format=torch.channels_last)
    kernel(
        (ctypes.c_int64 * len(shape))(*shape),
        input.data_ptr(),
        grad_output.data_ptr(),
        out.data_ptr(),
        input.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    grad_weight: Tensor = out.to(weight.dtype)
    return grad_weight
