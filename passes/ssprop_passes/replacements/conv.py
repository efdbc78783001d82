"""Convolutions: their gradients from the strongest channels of grad_output.

These are plain torch functions. A pass traces them into the graph, and tests call them directly.

    before    dx, dw, _ = convolution_backward(dy, x, w)

    after     idx = topk(norm(dy), k)
              dx, dw_k, _ = convolution_backward(dy[:, idx], x, w[idx])
              dw = zeros.index_put([idx], dw_k)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ssprop_passes.kernels.operators import reduced_conv_backward
from ssprop_passes.replacements.gradients import Gradients
from ssprop_passes.selection.gather_scatter import (
    add_channels,
    gather_channels,
    gather_weight,
    is_channels_last,
    scatter_rows,
    sum_channels,
)
from ssprop_passes.selection.policy import Selection

__all__ = ["ConvGeometry", "conv_gradients", "sparse_conv_backward"]


@dataclass(frozen=True)
class ConvGeometry:
    """The parameters of a convolution; tuples have one entry per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def is_depthwise(self, weight: Tensor) -> bool:
        """Say whether each output channel reads only one of several input channels."""
        inputs_of_group = weight.shape[0] // self.groups if self.transposed else weight.shape[1]
        return self.groups > 1 and inputs_of_group == 1

    def selection_groups(self, weight: Tensor) -> int:
        """Return the number of groups within which channels are selected."""
        return 1 if self.is_depthwise(weight) else self.groups


def sparse_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    k: int,
    geometry: ConvGeometry,
    output_mask: Sequence[bool],
    selection: Selection = Selection(),
    memory: Tensor | None = None,
) -> Gradients:
    """Return the gradients of a convolution from the kept channels of `grad_output`.

    This is ssProp (Zhong, Huang, Shi, arXiv 2408.12561, section 3), for convolutions of any
    dimension. With groups, it keeps k channels of each group. In a depthwise convolution each
    output channel reads one input channel: it keeps k of all channels, and gathers their inputs.

    Args:
        grad_output: [N, C, *out_space].
        input: [N, C_in, *space].
        weight: [C, C_in / groups, *kernel]; if transposed, [C_in, C / groups, *kernel].
        k: keep count of each selection group; may be a SymInt.
        geometry: stride, padding and so on.
        output_mask: which of the gradients of input, weight and bias are wanted.
        selection: which channels are kept; those with the largest l2 norm by default.
        memory: what the last step left out; updated in place. None without memory.

    Returns:
        Full-size gradients of input, weight and bias, None if not wanted. Weight rows and bias
        entries of channels that were not selected are zero.
    """
    is_depthwise = geometry.is_depthwise(weight)
    rows = weight_rows(weight, geometry.groups, geometry.transposed)
    kept, indices = selection.keep(grad_output, rows, k, geometry.selection_groups(weight), memory)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0] or output_mask[1]:
        kept_weight, kept_input, groups = gather_weight(rows, indices), input, geometry.groups
        if is_depthwise:
            sources = indices // (grad_output.shape[1] // input.shape[1])
            kept_input, groups = gather_channels(input, sources), k
        elif geometry.transposed:
            kept_weight = rows_weight(kept_weight, groups)
        grad_input, kept_grad = conv_gradients(
            kept,
            kept_input,
            kept_weight,
            replace(geometry, groups=groups),
            output_mask,
            is_channels_last(input) or is_channels_last(weight),
        )
        if output_mask[0] and is_depthwise:
            grad_input = add_channels(grad_input, sources, input)
        if output_mask[1]:
            if not is_depthwise:
                kept_grad = weight_rows(kept_grad, groups, geometry.transposed)
            grad_weight = scatter_rows(kept_grad, indices, rows)
            if geometry.transposed:
                grad_weight = rows_weight(grad_weight, geometry.groups)
    if output_mask[2]:
        bias = grad_output.new_empty(grad_output.shape[1])
        grad_bias = scatter_rows(sum_channels(kept), indices, bias)
    return grad_input if output_mask[0] else None, grad_weight, grad_bias


def conv_gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    output_mask: Sequence[bool],
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of input and weight with `reduced_conv_backward`.

    Args:
        grad_output: [N, C, *out_space].
        input: [N, C_in, *space].
        weight: [C, C_in / groups, *kernel]; if transposed, [C_in, C / groups, *kernel].
        geometry: stride, padding and so on.
        output_mask: which of the two are wanted.
        channels_last: whether the gradients are channels last.

    Returns:
        The gradients; an empty tensor if not wanted.
    """
    gradients: tuple[Tensor, Tensor] = reduced_conv_backward(
        grad_output,
        input,
        weight,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding,
        geometry.groups,
        output_mask[:2],
        channels_last,
    )
    return gradients


def weight_rows(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Return a convolution weight as one row per output channel, [C, C_in / groups, *kernel]."""
    if not transposed:
        return weight
    by_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return by_group.transpose(1, 2).flatten(0, 1)


def rows_weight(rows: Tensor, groups: int) -> Tensor:
    """Return the weight of a transposed convolution, [C_in, C / groups, *kernel], from its rows."""
    by_group = rows.reshape(groups, rows.shape[0] // groups, *rows.shape[1:])
    return by_group.transpose(1, 2).flatten(0, 1)
