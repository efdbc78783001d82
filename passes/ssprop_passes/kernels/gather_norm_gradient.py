"""Channels gathered from a batch norm's gradient on a CPU, by `gather_norm_gradient.cpp`.

Inductor compiles one kernel per shape, which takes a second and looks the channels up one by one.
Our kernel is compiled once for all shapes. With AVX-512 it picks the channels from vectors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssprop_passes.kernels.cpp_loader import COUNT, POINTER, kernel_maybe

__all__ = ["DTYPES", "gather_columns", "gather_norm_gradient", "norm_gradient"]

# Dtypes of g and x that the kernel takes.
DTYPES = (torch.float32, torch.bfloat16)

# Number of constants of a gradient that no ReLU masks.
_UNMASKED = 4


def norm_gradient(g: Tensor, x: Tensor, constants: Sequence[Tensor]) -> Tensor:
    """Return a batch norm's gradient, in the shape of g, from the parts in a `NormGradient`."""
    scale, mean, mean_g, projection = constants
    return (g - (x - mean) * projection - mean_g) * scale


def gather_columns(columns: list[Tensor], indices: Tensor) -> Tensor:
    """Return R columns at `indices`, [R, k]; each column has C elements, in any shape."""
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
        g: gradient of the norm's output, [N, ..., C], one of `DTYPES`, on a CPU. With seven
            constants, gradient of the output of a ReLU after the norm. With `excitation`, gradient
            of the output of squeeze and excitation after these.
        x: the norm's input, with the shape and dtype of g.
        constants: scale, mean, mean gradient and projection, C elements each, float32; with a
            ReLU, also the norm's 1 / std, weight and bias.
        excitation: a factor of g, and an addend of the product, N * C elements each, float32;
            empty without squeeze and excitation.
        indices: channels to gather, [k].

    Raises:
        IndexError: an index is out of range.
    """
    # Raises the error if an index is out of range.
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
