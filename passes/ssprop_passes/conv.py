"""Convolutions: `aten.convolution_backward` from the strongest channels of grad_output.

On the joint graph every convolution of every model is this one node, whatever its source.

    before    dx, dw, _ = convolution_backward(dy, x, w)

    after     idx = topk(mean(abs(dy)), k)
              dx, dw_k, _ = convolution_backward(dy[:, idx], x, w[idx])
              dw = zeros.index_put([idx], dw_k)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.rewrite import replace_outputs
from ssprop_passes.selection import (
    channel_scores,
    gather_channels,
    scatter_rows,
    select_channels,
    sum_channels,
)
from ssprop_passes.sites import Gradients, SiteMatch, hinted

__all__ = ["ConvGeometry", "ConvMatch", "match_conv_backward", "sparse_conv_backward"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvGeometry:
    """The parameters of a convolution, one entry a spatial dimension where a tuple."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def sparse_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    k: int,
    geometry: ConvGeometry,
    output_mask: Sequence[bool],
) -> Gradients:
    """Return the gradients of a convolution from the k strongest channels of `grad_output`.

    ssProp (Zhong, Huang, Shi, arXiv 2408.12561, section 3).

    Args:
        grad_output: [N, C, *out_space].
        input: [N, C_in, *space].
        weight: [C, C_in, *kernel].
        k: keep count, in [1, C]; may be a SymInt.
        geometry: stride, padding and so on.
        output_mask: which of the gradients of input, weight and bias are wanted.

    Returns:
        Gradients of input, weight and bias, full-size, None where not wanted. Rows of the weight
        and entries of the bias that were not selected are zero.
    """
    indices = select_channels(channel_scores(grad_output), k)
    kept = gather_channels(grad_output, indices)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0] or output_mask[1]:
        grad_input, rows, _ = aten.convolution_backward(
            kept,
            input,
            weight[indices],
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.transposed,
            geometry.output_padding,
            geometry.groups,
            [output_mask[0], output_mask[1], False],
        )
        grad_weight = scatter_rows(rows, indices, weight) if output_mask[1] else None
    if output_mask[2]:
        bias = grad_output.new_empty(grad_output.shape[1])
        grad_bias = scatter_rows(sum_channels(kept), indices, bias)
    return grad_input if output_mask[0] else None, grad_weight, grad_bias


@dataclass(frozen=True)
class ConvMatch(SiteMatch):
    """An `aten.convolution_backward` node.

    Attributes:
        node: the node.
        grad_output, input, weight: nodes of its tensors.
        geometry: its parameters.
        output_mask: which of the gradients of input, weight and bias it computes.
    """

    node: fx.Node
    grad_output: fx.Node
    input: fx.Node
    weight: fx.Node
    geometry: ConvGeometry
    output_mask: tuple[bool, bool, bool]

    @property
    def kind(self) -> str:
        """Such as `conv2d` or `conv_transpose1d`."""
        transpose = "_transpose" if self.geometry.transposed else ""
        return f"conv{transpose}{self.weight.meta['val'].ndim - 2}d"

    @property
    def channels(self) -> int:
        """Output channels, C."""
        return int(self.grad_output.meta["val"].shape[1])

    @property
    def groups(self) -> int:
        """Number of groups that channels are selected in."""
        return self.geometry.groups

    @property
    def flops(self) -> int:
        """Floating-point operations of the wanted gradients of input and weight.

        Not from `torch.utils.flop_counter`: its formula miscounts the groups of a backward.
        """
        positions = hinted(
            (self.input if self.geometry.transposed else self.grad_output).meta["val"]
        )
        products = positions.numel() * self.weight.meta["val"][0].numel()
        return 2 * int(products) * sum(self.output_mask[:2])

    @property
    def inputs(self) -> Sequence[fx.Node]:
        """grad_output, input and weight."""
        return self.grad_output, self.input, self.weight

    @property
    def bias_sum(self) -> fx.Node | None:
        """The sum that is the bias gradient where Inductor split it off, as it does on GPU."""
        if self.output_mask[2]:
            return None
        over = [d for d in range(self.grad_output.meta["val"].ndim) if d != 1]
        for user in self.grad_output.users:
            if (
                user.target is aten.sum.dim_IntList
                and len(user.args) == 2
                and sorted(cast(list[int], user.args[1])) == over
                and user.meta.get("seq_nr") == self.node.meta.get("seq_nr")
                and user.meta.get("partitioner_tag") == "is_backward"
            ):
                return user
        return None

    def why_unsupported(self) -> str:
        """Return why this convolution's backward cannot be made sparse, "" if it can."""
        if self.geometry.transposed:
            return "transposed convolution"
        if self.weight.meta["val"].ndim != 4:
            return "not a 2-D convolution"
        if self.geometry.groups != 1:
            return "grouped convolution"
        return ""

    def backward(self, k: int, *tensors: Tensor) -> Gradients:
        """Return the sparse gradients of input, weight and bias."""
        grad_output, input_, weight = tensors
        # One meaning of the bias gradient on every device: of the kept channels alone.
        mask = (*self.output_mask[:2], self.output_mask[2] or self.bias_sum is not None)
        return sparse_conv_backward(grad_output, input_, weight, k, self.geometry, mask)

    def replace(self, gradients: Sequence[fx.Node | None]) -> None:
        """Put the sparse gradients in place of the node's results."""
        if (bias_sum := self.bias_sum) is not None:
            bias_sum.replace_all_uses_with(cast(fx.Node, gradients[2]))
            bias_sum.graph.erase_node(bias_sum)
        replace_outputs(self.node, gradients)


def match_conv_backward(node: fx.Node) -> ConvMatch | None:
    """Return the match of an `aten.convolution_backward` node, None for any other node."""
    if node.op != "call_function" or node.target is not aten.convolution_backward.default:
        return None
    args: tuple[Any, ...] = node.args
    grad_output, input_, weight, _bias_sizes, stride, padding, dilation = args[:7]
    transposed, output_padding, groups, output_mask = args[7:]
    geometry = ConvGeometry(
        tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding), groups
    )
    return ConvMatch(node, grad_output, input_, weight, geometry, tuple(output_mask))
