"""DepthwiseLayoutPass: the backward of depthwise convolutions in channels last, without copies.

This pass is independent of sparsity. In torch 2.14, Inductor gives input and
grad_output of `convolution_backward` the order of dimensions that the weight's gradient has. In a
depthwise weight, [C, 1, kh, kw], two dimensions have the stride 1, and Inductor takes the wrong one
as the innermost. So it copies both tensors from [N, H, W, C] to the order [N, H, C, W], and ATen
copies them back. The pass puts an operator of ours in the place, which takes both as they are:

    before    dx, dw, db = aten::convolution_backward(dy, x, w)
    after     dx, dw = ssprop::conv_backward(dy, x, w),  db = sum(dy)
"""

from torch import Tensor, fx

from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.rewrite import (
    INSERTED_KEY,
    Replacer,
    inductor_decompositions,
    replace_outputs,
)
from ssprop_passes.replacements.conv import conv_gradients
from ssprop_passes.replacements.gradients import Gradients
from ssprop_passes.selection.gather_scatter import is_channels_last, sum_channels
from ssprop_passes.sites.conv_match import ConvMatch, match_conv_backward

__all__ = ["DepthwiseLayoutPass"]


class DepthwiseLayoutPass(GraphPass):
    """Keeps the backward of depthwise convolutions in channels last.

    It also does that for convolutions of one input channel. The gradients are the same. Dense
    training can use the pass, too:

        torch.compile(model, options={"joint_custom_pre_pass": DepthwiseLayoutPass()})
    """

    def identity(self) -> str:
        """Return a constant: the rewrite depends only on the graph."""
        return "depthwise layout"

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite the backward of each depthwise convolution of images in channels last."""
        replacer, summary = Replacer(inductor_decompositions), PassSummary()
        for node in list(graph.nodes):
            match = match_conv_backward(node)
            if match is not None and not node.meta.get(INSERTED_KEY) and _is_suited(match):
                _rewrite(replacer, match)
                summary.matched += 1
                summary.rewritten += 1
        return summary


def _is_suited(match: ConvMatch) -> bool:
    grad_output, weight = match.grad_output.meta["val"], match.weight.meta["val"]
    return bool(
        grad_output.ndim == 4
        and weight.shape[1] == 1
        and not match.geometry.transposed
        and is_channels_last(grad_output)
    )


def _rewrite(replacer: Replacer, match: ConvMatch) -> None:
    wanted = match.output_mask

    def replacement(grad_output: Tensor, input_: Tensor, weight: Tensor) -> Gradients:
        dx, dw = conv_gradients(grad_output, input_, weight, match.geometry, wanted, True)
        return (
            dx if wanted[0] else None,
            dw if wanted[1] else None,
            sum_channels(grad_output) if wanted[2] else None,
        )

    replace_outputs(match.node, replacer.insert(match.node, replacement, match.inputs))
    match.node.graph.erase_node(match.node)
