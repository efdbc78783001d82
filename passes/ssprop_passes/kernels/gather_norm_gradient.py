"""Channels gathered from a batch norm's gradient on a CPU, by `gather_norm_gradient.cpp`.

Inductor has a kernel of its own for each shape, which takes a second to compile and looks the
channels up one by one. This one is compiled once for all of them, and with AVX-512 picks the
channels from vectors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssprop_passes.kernels.cpp_loader import COUNT, POINTER, kernel_maybe

__all__ = ["DTYPES", "gather_columns", "gather_norm_gradient", "norm_gradient"]

# Of the tensors that the kernel reads.
DTYPES = (torch.float32, torch.bfloat16)

# Constants of a gradient that no ReLU masks.
_UNMASKED = 4


def norm_gradient(g: Tensor, x: Tensor, constants: Sequence[Tensor]) -> Tensor:
    """Return a batch norm's gradient, in the shape of g, from what a `NormGradient` names."""
    scale, mean, mean_g, projection = constants
    return (g - (x - mean) * projection - mean_g) * scale


def gather_columns(columns: list[Tensor], indices: Tensor) -> Tensor:
    """Return each of R columns at `indices`, [R, k]; columns are of C elements and any shape."""
    return torch.stack([column.reshape(-1).index_select(0, indices) for column in columns])


def gather_norm_gradient(
    g: Tensor,
    x: Tensor,
    constants: list[Tensor],
    excitation: list[Tensor],
    indices: Tensor,
) -> Tensor:
    """Return the channels `indices` of a batch norm's gradient, [N, ..., k].

    Args:
        g: gradient of the norm's output, [N, ..., C], of one of `DTYPES`, on a CPU; of the output
            of a ReLU that the norm feeds, where there are seven constants; of what that output
            becomes by squeeze and excitation where `excitation` is.
        x: the norm's input, in the shape and dtype of g.
        constants: scale, mean, mean gradient and projection, of C elements each, float32; with a
            ReLU, also the norm's 1 / std, weight and bias.
        excitation: what g is multiplied by and what is then added, of N * C elements each,
            float32; nothing for neither.
        indices: of the channels, [k].

    Raises:
        IndexError: there is no such channel.
    """
    # Says so of indices that are out of range.
    columns = gather_columns(constants, indices)
    kernel = kernel_maybe("gather_norm_gradient", *[POINTER] * 6, *[COUNT] * 7)
    samples, channels, is_masked = len(g), g.shape[-1], len(columns) > _UNMASKED
    excited = [x.reshape(samples, channels).index_select(1, indices) for x in excitation]
    if kernel is None:
        kept, sources = g[..., indices], x[..., indices]
        if excited:
            factor, addend = (x.view(samples, *[1] * (g.ndim - 2), -1) for x in excited)
            kept = kept * factor + addend
        if is_masked:
            inverse_std, weight, bias = columns[_UNMASKED:]
            activated = (sources - columns[1]) * inverse_std * weight + bias
            kept = torch.where(activated <= 0, 0, kept)
        return norm_gradient(kept, sources, columns[:_UNMASKED].unbind()).to(g.dtype)
    g, x, indices = g.contiguous(), x.contiguous(), indices.long().contiguous()
    by_sample = torch.stack(excited) if excited else None
    out = g.new_empty(*g.shape[:-1], len(indices))
    kernel(
        g.data_ptr(),
        x.data_ptr(),
        columns.data_ptr(),
        None if by_sample is None else by_sample.data_ptr(),
        indices.data_ptr(),
        out.data_ptr(),
        samples,
        g.numel() // max(samples * channels, 1),
        channels,
        len(indices),
        is_masked,
        g.dtype is torch.float32,
        torch.get_num_threads(),
    )
    return out
