"""Our operators, for cases that torch's operators do not serve.

`reduced_conv_backward` is a convolution backward whose channel count may be read at run time. The
fake kernel of `aten.convolution_backward` guards on that count unless it is the leading size (on
torch 2.11 always), and Inductor's lowering guards on the weight's. Our operator has its own fake
kernel, and takes the layout of the results as an argument.

`gather_weight` and `scatter_rows` gather and scatter weights, opaque to Inductor. Inductor would
compile kernels for each shape, which takes seconds, and they are no faster than ATen's.

`gather_columns` looks up a few numbers per channel. Inductor would look them up one by one, again
at every position that uses them. `gather_norm_gradient` and Inductor's kernels read the result as
vectors.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ssprop_passes.kernels import gather_norm_gradient as norm_gather
from ssprop_passes.kernels.conv1x1 import conv1x1_backward, is_conv1x1
from ssprop_passes.kernels.conv_grad_weight import conv_grad_weight, grad_weight_kernel_maybe

__all__ = [
    "conv_backward_flops",
    "gather_columns",
    "gather_norm_gradient",
    "gather_weight",
    "reduced_conv_backward",
    "register_flops",
    "scatter_rows",
]

aten = torch.ops.aten

_library = torch.library.Library("ssprop", "DEF")  # type: ignore[no-untyped-call]


def _conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    if not transposed and is_conv1x1(grad_output, input, weight, padding, groups):
        found = conv1x1_backward(grad_output, input, weight, stride, output_mask)
    else:
        geometry = stride, padding, dilation, transposed, output_padding, groups
        found = _spatial_backward(grad_output, input, weight, *geometry, output_mask)
    layout = _memory_format(input.ndim, channels_last)
    grad_input, grad_weight = (
        grad_output.new_empty(0) if gradient is None else gradient.contiguous(memory_format=layout)
        for gradient in found
    )
    return grad_input, grad_weight


def _spatial_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    grad_input = grad_weight = kernel = None
    if output_mask[1] and not transposed:
        kernel = grad_weight_kernel_maybe(grad_output, input, weight, stride, groups)
    if output_mask[0] or kernel is None:
        grad_input, grad_weight, _ = aten.convolution_backward(
            grad_output,
            input,
            weight,
            None,
            stride,
            padding,
            dilation,
            transposed,
            output_padding,
            groups,
            [output_mask[0], output_mask[1] and kernel is None, False],
        )
    if kernel is not None:
        grad_weight = conv_grad_weight(
            grad_output, input, weight, stride, padding, dilation, groups, kernel
        )
    return grad_input, grad_weight


def _fake_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
    channels_last: bool,
) -> tuple[Tensor, Tensor]:

    def empty(shape: Sequence[int], is_wanted: bool) -> Tensor:
        if not is_wanted:
            return grad_output.new_empty(0)
        return grad_output.new_empty_strided(shape, _strides(shape, channels_last))

    return empty(input.shape, output_mask[0]), empty(weight.shape, output_mask[1])


def _gather_weight(rows: Tensor, indices: Tensor, channels_last: bool) -> Tensor:
    """Return `rows[indices]`, [k, ...]; rows is [C, ...]."""
    return _laid_out(_in_memory(rows, channels_last).index_select(0, indices), channels_last)


def _fake_gather_weight(rows: Tensor, indices: Tensor, channels_last: bool) -> Tensor:
    shape = [indices.shape[0], *rows.shape[1:]]
    return rows.new_empty_strided(shape, _strides(shape, channels_last))


def _scatter_rows(rows: Tensor, indices: Tensor, count: int, channels_last: bool) -> Tensor:
    """Return zeros, [count, ...], with `rows`, [k, ...], at `indices`."""
    rows = _in_memory(rows, channels_last)
    zeros = rows.new_zeros(count, *rows.shape[1:])
    return _laid_out(zeros.index_copy_(0, indices, rows), channels_last)


def _fake_scatter_rows(rows: Tensor, indices: Tensor, count: int, channels_last: bool) -> Tensor:
    shape = [count, *rows.shape[1:]]
    return rows.new_empty_strided(shape, _strides(shape, channels_last))


def _fake_gather_columns(columns: list[Tensor], indices: Tensor) -> Tensor:
    return columns[0].new_empty(len(columns), indices.shape[0])


def _fake_gather_norm_gradient(
    g: Tensor,
    x: Tensor,
    constants: list[Tensor],
    excitation: list[Tensor],
    indices: Tensor,
) -> Tensor:
    return g.new_empty(*g.shape[:-1], indices.shape[0])


for _schema, _kernel, _fake in (
    (
        "conv_backward(Tensor grad_output, Tensor input, Tensor weight, int[] stride,"
        " int[] padding, int[] dilation, bool transposed, int[] output_padding, SymInt groups,"
        " bool[] output_mask, bool channels_last) -> (Tensor, Tensor)",
        _conv_backward,
        _fake_conv_backward,
    ),
    (
        "gather_weight(Tensor rows, Tensor indices, bool channels_last) -> Tensor",
        _gather_weight,
        _fake_gather_weight,
    ),
    (
        "scatter_rows(Tensor rows, Tensor indices, int count, bool channels_last) -> Tensor",
        _scatter_rows,
        _fake_scatter_rows,
    ),
    (
        "gather_columns(Tensor[] columns, Tensor indices) -> Tensor",
        norm_gather.gather_columns,
        _fake_gather_columns,
    ),
    (
        "gather_norm_gradient(Tensor g, Tensor x, Tensor[] constants,"
        " Tensor[] excitation, Tensor indices) -> Tensor",
        norm_gather.gather_norm_gradient,
        _fake_gather_norm_gradient,
    ),
):
    # By default torch requires exact strides. These contain `max(k, 1)` where Inductor has k, and
    # Inductor does not fuse kernels that differ in this.
    _name = _library.define(  # type: ignore[no-untyped-call]
        _schema, tags=torch.Tag.needs_fixed_stride_order
    )
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"ssprop::{_name}", _fake, lib=_library)

reduced_conv_backward = torch.ops.ssprop.conv_backward.default
gather_weight = torch.ops.ssprop.gather_weight.default
scatter_rows = torch.ops.ssprop.scatter_rows.default
gather_columns = torch.ops.ssprop.gather_columns.default
gather_norm_gradient = torch.ops.ssprop.gather_norm_gradient.default


def conv_backward_flops(
    grad_output_shape: Sequence[int],
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    transposed: bool,
    output_mask: Sequence[bool],
) -> int:
    """Return the FLOPs of a convolution's backward; a multiply-add counts as two.

    The gradients of input and weight each take as many products as the forward. The backward
    formula of `torch.utils.flop_counter` miscounts groups.
    """
    positions = math.prod(input_shape if transposed else grad_output_shape)
    return 2 * positions * math.prod(weight_shape[1:]) * sum(output_mask[:2])


@cache
def register_flops() -> None:
    """Register the FLOPs of the reduced convolution with `torch.utils.flop_counter`.

    Not done on import: that module imports Triton, which takes longer than all of this package.
    """
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.ssprop.conv_backward)(_reduced_flops)


def _reduced_flops(
    grad_output_shape: Sequence[int],
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: Sequence[bool],
    *_args: object,
    **_kwargs: object,
) -> int:
    return conv_backward_flops(
        grad_output_shape, input_shape, weight_shape, transposed, output_mask
    )


def _memory_format(ndim: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


def _in_memory(x: Tensor, channels_last: bool) -> Tensor:
    """Return `x` contiguous, with its dimensions in memory order."""
    return (x.movedim(1, -1) if channels_last else x).contiguous()


def _laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """Return `x` with its dimensions in their original order: the reverse of `_in_memory`."""
    return x.movedim(-1, 1) if channels_last else x


def _strides(shape: Sequence[int], channels_last: bool) -> list[int]:
    """Return dense strides, without torch's max(size, 1), which needs to know the size."""
    order = [1, *range(len(shape) - 1, 1, -1), 0] if channels_last else range(len(shape))[::-1]
    strides = [1] * len(shape)
    step = 1
    for dim in order:
        strides[dim] = step
        step = step * shape[dim]
    return strides
