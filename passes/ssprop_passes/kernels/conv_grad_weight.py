"""Weight gradient of a convolution from few kept channels, on a CPU.

oneDNN's vectors hold output channels of one group. If few channels are kept, its time falls by less
than their number, and hardly at all if few of each group are kept. In our kernel,
`conv_grad_weight.cpp`, vectors hold input channels, so the time is proportional to the kept
channels.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssprop_passes.kernels.cpp_loader import COUNT, POINTER, kernel_maybe

__all__ = ["conv_grad_weight", "grad_weight_kernel_maybe"]

# With one group, fewer input channels than this leave much of a vector empty.
_MIN_SOURCES = 16

# With AVX-512, in bfloat16, ATen is faster if a group keeps more channels than this.
_MAX_KEPT = 10

# With AVX-512, in float32 with one group, ATen is faster if its vectors are full (the kept channels
# are a multiple of `_VECTOR`) and the input channels are fewer than `_MANY_SOURCES`.
_VECTOR, _MANY_SOURCES = 16, 128

# For a 1x1 convolution without a stride, ATen is faster if images have more positions than this.
_FEW_POSITIONS = 64


def grad_weight_kernel_maybe(
    grad_output: Tensor, input: Tensor, weight: Tensor, stride: Sequence[int], groups: int
) -> Callable[..., None] | None:
    """Return the kernel for `conv_grad_weight`; None if ATen should compute the gradient.

    ATen should if the kernel does not take the tensors, if ATen is faster, or, after a warning, if
    the kernel does not compile.
    """
    is_suited = (
        grad_output.ndim == 4
        and grad_output.numel() > 0
        and input.device.type == "cpu"
        and input.dtype == grad_output.dtype
        and input.dtype in (torch.float32, torch.bfloat16)
        and _is_faster(grad_output, weight, stride, groups)
        and input.is_contiguous(memory_format=torch.channels_last)
        and grad_output.is_contiguous(memory_format=torch.channels_last)
    )
    if not is_suited:
        return None
    return kernel_maybe("conv_grad_weight", *[POINTER] * 4, COUNT, COUNT)


def _is_faster(grad_output: Tensor, weight: Tensor, stride: Sequence[int], groups: int) -> bool:
    """Say whether the kernel is faster than ATen, as measured with AVX-512 and with only AVX2."""
    kept, sources = weight.shape[0] // groups, weight.shape[1]
    capability = torch.backends.cpu.get_cpu_capability()
    has_avx512, is_single = "AVX512" in capability, grad_output.dtype == torch.float32
    if groups > 1:
        limit = _MAX_KEPT if has_avx512 and not is_single else sources
        return kept <= min(limit, sources - 1) and sources % 4 == 0
    if sources < _MIN_SOURCES:
        return False
    is_product = max(weight.shape[2:]) == 1
    if not has_avx512:
        # In float32 oneDNN is as fast for 1x1 kernels.
        return capability == "AVX2" and not (is_product and is_single)
    if is_product:
        is_faster = max(stride) > 1 or grad_output[0, 0].numel() <= _FEW_POSITIONS
    else:
        is_faster = sources >= _MANY_SOURCES or kept % _VECTOR != 0
    return is_single and is_faster


def conv_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    kernel: Callable[..., None],
) -> Tensor:
    """Return the weight gradient of a 2-D convolution, summed in float32.

    Args:
        grad_output: [N, C, H_out, W_out], float32 or bfloat16, channels last.
        input: [N, C_in, H, W], with the dtype and layout of grad_output.
        weight: [C, C_in / groups, *kernel]; only its shape and dtype are used.
        stride: one entry per spatial dimension.
        padding: one entry per spatial dimension.
        dilation: one entry per spatial dimension.
        groups: number of groups.
        kernel: the function that `grad_weight_kernel_maybe` returns.

    Returns:
        The gradient, with the weight's shape and dtype, channels last.
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
