"""A peer: dense torch.compile with the kernels of a sparse step.

On a CPU a sparse step has three kernels that make it faster even without sparsity: sums in two
steps (`ssprop_passes.transforms.two_step_sums`), our gradient of convolution weights
(`ssprop_passes.kernels.conv_grad_weight`), and 1x1 convolutions of all positions at once
(`ssprop_passes.kernels.conv1x1`). This dense step uses all three, to show their gain alone.
"""

from collections.abc import Callable

from ssprop_passes.graph.graph_pass import GraphPass, PassList, PassSummary
from ssprop_passes.graph.rewrite import Replacer
from ssprop_passes.replacements.conv import conv_gradients
from ssprop_passes.selection.gather_scatter import (
    dims_order,
    is_channels_last,
    sum_channels,
    with_order,
)
from ssprop_passes.sites.conv_match import ConvMatch, match_conv_backward
from ssprop_passes.transforms.depthwise_layout import DepthwiseLayoutPass
from ssprop_passes.transforms.two_step_sums import TwoStepSumsPass
from torch import Tensor, fx

__all__ = ["DenseKernelsPass", "dense_kernels", "exact_passes"]


class DenseKernelsPass(GraphPass):
    """Computes the gradients of all channels with the operator of the reduced convolution."""

    def identity(self) -> str:
        """Return a constant, because the rewrite depends only on the graph."""
        return "dense kernels"

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite each convolution backward."""
        replacer, summary = Replacer(dict), PassSummary()
        for node in list(graph.nodes):
            match = match_conv_backward(node)
            if match is not None:
                match.replace(replacer.insert(node, _whole(match), match.inputs)[:3])
                summary.matched += 1
                summary.rewritten += 1
        return summary


def dense_kernels() -> PassList:
    """Return the passes that give a dense step the kernels of sparse steps."""
    return PassList([TwoStepSumsPass(), DenseKernelsPass()])


def exact_passes() -> PassList:
    """Return the passes of a step of kept samples that leave nothing out."""
    return PassList([DepthwiseLayoutPass(), TwoStepSumsPass()])


def _whole(match: ConvMatch) -> Callable[..., tuple[Tensor | None, ...]]:
    """Return a function of grad_output, input and weight that computes the match's gradients."""
    geometry, mask = match.geometry, match.output_mask
    orders = [None if dense is None else dims_order(dense) for dense in match.dense_gradients]

    def backward(grad_output: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        is_last = is_channels_last(input) or is_channels_last(weight)
        found = conv_gradients(grad_output, input, weight, geometry, mask, is_last)
        gradients = [*found, sum_channels(grad_output) if mask[2] else None]
        return tuple(
            with_order(gradient, order) if wanted and order is not None else None
            for gradient, wanted, order in zip(gradients, mask, orders, strict=True)
        )

    return backward
