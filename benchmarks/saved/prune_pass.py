"""PruneSavedPass: weight gradients from pruned inputs, so that the pruned form alone is saved.

    before    y = x W^T                     dW = dy^T x                     saves x
    after     y = x W^T                     dW = dy^T filled(values, masks)
              values, masks = prune(x)                                      saves values, masks

The forward and the gradients of inputs, biases and norms are exact. After Back Razor (Jiang et al.,
NeurIPS 2022), and the structured pruning of Barley and Fröning (Less Memory Means Smaller GPUs,
2023). The partitioner saves the smaller of x and its pruned form, unless x is needed as it is.
"""

import hashlib
from pathlib import Path
from typing import cast

import torch
from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.rewrite import Replacer, inductor_decompositions
from torch import Tensor, fx

from benchmarks.saved.operators import BLOCK, GRAD_WEIGHT, PRUNE
from benchmarks.saved.sites import Site, find_sites

__all__ = ["PruneSavedPass"]


class PruneSavedPass(GraphPass):
    """Makes the weight gradients of linear layers and 1x1 convolutions from pruned inputs.

        torch.compile(model, options={"joint_custom_pre_pass": PruneSavedPass(2)})

    Args:
        kept: features kept of every eight, from 1 to 8.
    """

    def __init__(self, kept: int) -> None:
        super().__init__()
        if not 1 <= kept <= BLOCK:
            raise ValueError(f"kept must be from 1 to {BLOCK}, got {kept}")
        self.kept = kept

    def identity(self) -> str:
        """Return what the rewrite depends on, with the sources beside this file."""
        sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.*p*"))]
        return f"{self.kept} of {BLOCK}, {hashlib.sha256(b''.join(sources)).hexdigest()}"

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite each weight gradient whose input would be saved for it alone."""
        replacer, summary = Replacer(inductor_decompositions), PassSummary()
        sites = list(find_sites(graph))
        left = [_why_left_maybe(site) for site in sites]
        pruned: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for site, why in zip(sites, left, strict=True):
            summary.matched += 1
            if why is not None:
                summary.left[why] += 1
                continue
            if site.input not in pruned:
                pruned[site.input] = self._prune(replacer, site)
            _rewrite(replacer, site, *pruned[site.input])
            summary.rewritten += 1
        return summary

    def _prune(self, replacer: Replacer, site: Site) -> tuple[fx.Node, fx.Node]:
        """Prune the input right after it is computed, in the forward."""

        def prune(x: Tensor) -> tuple[Tensor, ...]:
            return cast(tuple[Tensor, ...], PRUNE(site.rows(x), self.kept))

        before = set(site.input.graph.nodes)
        values, masks = replacer.insert(site.input.next, prune, [site.input])
        for node in site.input.graph.nodes:
            if node not in before:
                node.meta["partitioner_tag"] = "is_forward"
        assert values is not None
        assert masks is not None
        return values, masks


def _why_left_maybe(site: Site) -> str | None:
    value = site.input.meta["val"]
    if value.shape[-1 if value.ndim == 2 else 1] % BLOCK:
        return f"its features are no multiple of {BLOCK}"
    if value.dtype not in (torch.float32, torch.float64):
        return f"its input is {value.dtype}"
    return "its input is saved anyway" if site.is_saved_anyway else None


def _rewrite(replacer: Replacer, site: Site, values: fx.Node, masks: fx.Node) -> None:
    def grad_weight(grad_output: Tensor, values: Tensor, masks: Tensor) -> tuple[Tensor]:
        kept = site.used(values), site.used(masks)
        return (site.like_weight(GRAD_WEIGHT(site.rows(grad_output), *kept)),)

    (gradient,) = replacer.insert(site.node, grad_weight, [site.grad_output, values, masks])
    assert gradient is not None
    site.replace(gradient)
