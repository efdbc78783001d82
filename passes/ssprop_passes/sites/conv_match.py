"""Find the backward of convolutions in a joint graph.

The backward of every convolution is a single node, `aten.convolution_backward`.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph.rewrite import INSERTED_KEY, find_sum_maybe, replace_node, replace_outputs
from ssprop_passes.kernels.operators import conv_backward_flops
from ssprop_passes.replacements.conv import (
    ConvGeometry,
    sparse_conv_backward,
)
from ssprop_passes.replacements.gradients import Gradients
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.flops import hinted, size_hint
from ssprop_passes.sites.match import SiteMatch

__all__ = ["ConvMatch", "match_conv_backward"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ConvMatch(SiteMatch):
    """An `aten.convolution_backward` node.

    Attributes:
        node: the node.
        grad_output, input, weight: nodes of its tensor operands.
        geometry: stride, padding and so on.
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
        """A name such as `conv2d` or `conv_transpose1d`."""
        transpose = "_transpose" if self.geometry.transposed else ""
        return f"conv{transpose}{self.weight.meta['val'].ndim - 2}d"

    @property
    def channels(self) -> int:
        """Output channels, C."""
        return size_hint(self.grad_output.meta["val"].shape[1])

    @property
    def groups(self) -> int:
        """Number of groups within which channels are selected."""
        return self.geometry.selection_groups(self.weight.meta["val"])

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """Which gradients are computed; another node may compute the bias gradient."""
        return (*self.output_mask[:2], self.output_mask[2] or self.bias_sum is not None)

    @property
    def form(self) -> Hashable:
        """The geometry, and which gradients are computed."""
        return self.geometry, self.wanted

    def flops_of(self, mask: Sequence[bool]) -> int:
        """Return the FLOPs of the gradients of input and weight."""
        grad_output, input_, weight = (hinted(node.meta["val"]).shape for node in self.inputs)
        return conv_backward_flops(grad_output, input_, weight, self.geometry.transposed, mask)

    @property
    def nodes(self) -> Sequence[fx.Node]:
        """The node."""
        return (self.node,)

    @property
    def inputs(self) -> Sequence[fx.Node]:
        """grad_output, input and weight."""
        return self.grad_output, self.input, self.weight

    @property
    def bias_sum(self) -> fx.Node | None:
        """The sum for the bias gradient, if Inductor split it off, as it does on GPU."""
        return None if self.output_mask[2] else find_sum_maybe(self.grad_output, 1, self.node)

    @property
    def dense_gradients(self) -> Gradients:
        """The fake values of the node's results."""
        return cast(Gradients, tuple(self.node.meta["val"]))

    def backward(
        self, k: int, selection: Selection, *tensors: Tensor, memory: Tensor | None = None
    ) -> Gradients:
        """Return the sparse gradients of input, weight and bias."""
        grad_output, input_, weight = tensors
        # On every device the bias gradient uses only the kept channels.
        mask = selection.sparse(self.wanted)
        return sparse_conv_backward(
            grad_output, input_, weight, k, self.geometry, mask, selection, memory
        )

    def replace(self, gradients: Sequence[fx.Node | None]) -> None:
        """Replace the node's results with the sparse gradients."""
        if (bias_sum := self.bias_sum) is not None and gradients[2] is not None:
            replace_node(bias_sum, gradients[2])
        replace_outputs(self.node, gradients)
        if self.node.users:
            # The node computes the dense gradients, and must not be matched again.
            dense = [
                wanted and g is None for wanted, g in zip(self.output_mask, gradients, strict=True)
            ]
            self.node.args = (*self.node.args[:-1], dense)
            values = zip(self.node.meta["val"], dense, strict=True)
            self.node.meta["val"] = tuple(val if is_dense else None for val, is_dense in values)
            self.node.meta[INSERTED_KEY] = True
        else:
            self.node.graph.erase_node(self.node)


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
