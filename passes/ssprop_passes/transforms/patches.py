"""PatchPass: the gradients of 1x1 convolutions from averages over patches of positions.

    before    dx, dw, db = convolution_backward(dy, x, w)              products over N H W rows

    after     g, a = avg_pool2d(dy, side), avg_pool2d(x, side)         [N, C, h, w], [N, C_in, h, w]
              dx = spread(g w),  dw = side^2 g^T a,  db = sum(dy)      products over N h w rows

It is gradient filtering (Yang, Li, Marculescu, CVPR 2023), which is biased. The forward saves `a`
in place of x if nothing else needs x.
"""

from typing import Any

from torch import Tensor, fx

from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.rewrite import INSERTED_KEY, Replacer, inductor_decompositions
from ssprop_passes.replacements.patches import patch_gradients
from ssprop_passes.selection.gather_scatter import dims_order, with_order
from ssprop_passes.sites.conv_match import ConvMatch, match_conv_backward

__all__ = ["PatchPass"]

_OTHER = "it is no 1x1 convolution of stride 1, without groups"
_FEW = "a patch would be all of its positions"


class PatchPass(GraphPass):
    """Computes the gradients of 1x1 convolutions from averages over patches.

    Without kept samples it is a pass for `torch.compile`:

        torch.compile(model, options={"joint_custom_pre_pass": PatchPass(2)})

    The convolutions have stride 1 and no groups, and more positions than a patch. The others stay
    as they are.

    Args:
        side: height and width of a patch in positions.

    Attributes:
        saved_flops: FLOPs that the patches of the last graph save.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.saved_flops = 0

    def identity(self) -> str:
        """Return the side."""
        return str(self.side)

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite the backward of each 1x1 convolution."""
        replacer, summary = Replacer(inductor_decompositions), PassSummary()
        self.saved_flops = 0
        for node in list(graph.nodes):
            match = match_conv_backward(node)
            if match is None or node.meta.get(INSERTED_KEY):
                continue
            summary.matched += 1
            if reason := self._why_not(match):
                summary.left[reason] += 1
                continue
            self.saved_flops += match.flops - match.flops // self.side**2
            self._rewrite(replacer, match)
            summary.rewritten += 1
        return summary

    def _why_not(self, match: ConvMatch) -> str:
        geometry = match.geometry
        is_pointwise = tuple(match.weight.meta["val"].shape[2:]) == (1, 1)
        is_plain = geometry.stride == (1, 1) and geometry.padding == (0, 0)
        if not (is_pointwise and is_plain) or geometry.groups > 1 or geometry.transposed:
            return _OTHER
        sides = match.grad_output.meta["val"].shape[2:]
        return "" if any(size > self.side for size in sides) else _FEW

    def _rewrite(self, replacer: Replacer, match: ConvMatch) -> None:
        orders = [None if dense is None else dims_order(dense) for dense in match.dense_gradients]

        def replacement(grad_output: Tensor, input_: Tensor, weight: Tensor) -> Any:
            mask = match.output_mask
            gradients = patch_gradients(grad_output, input_, weight, self.side, mask)
            # Views that follow in the graph may need the layout of the dense gradient.
            return tuple(
                gradient if gradient is None or order is None else with_order(gradient, order)
                for gradient, order in zip(gradients, orders, strict=True)
            )

        match.replace(replacer.insert(match.node, replacement, match.inputs))
