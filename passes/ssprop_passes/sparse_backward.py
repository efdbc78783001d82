"""SparseBackwardPass: every site's backward from its k strongest channels, k read at run time.

Why on the joint graph: forward and backward are partitioned afterwards, so that what the sparse
backward does not need is not saved, and what it adds is fused with its neighbours.

    before    dx, dw = backward(dy, x, w)

    after     k = keep_counts[slot].item()
              dx, dw = sparse_backward(dy, x, w, k)
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph_pass import GraphPass, Previous
from ssprop_passes.kinds import MATCHERS
from ssprop_passes.rewrite import INSERTED_KEY, splice, trace
from ssprop_passes.selection import with_strides
from ssprop_passes.sites import (
    MIN_KEEP_COUNT,
    Site,
    SiteMatch,
    Slot,
    layer_name,
    matrix_product_flops,
    why_dense,
)

__all__ = ["SparseBackwardPass", "find_sites"]


class SparseBackwardPass(GraphPass):
    """Makes the backward of the layers that have a slot sparse.

    Args:
        slots: the layers that take part, by name.
        excluded: the layers that do not, by name, with the reason.
        layers: the layer that each marked node of the forward graph belongs to, in order: part of
            the identity, because equal graphs of different models must not share an artifact.
        slot_count: length of the runtime sparsity tensor, the graph's last input.
        decompositions: returns the decomposition table of the compiler that the graph is for.
        previous: pass or passes to run first.

    Attributes:
        sites: what became of each site, after a run.
        total_flops: floating-point operations of all backward convolutions and matrix products.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        excluded: Mapping[str, str],
        layers: tuple[str, ...],
        slot_count: int,
        decompositions: Callable[[], dict[Any, Callable[..., Any]]],
        previous: Previous = None,
    ) -> None:
        super().__init__(previous)
        self.slots = slots
        self.excluded = excluded
        self.layers = layers
        self.slot_count = slot_count
        self.decompositions = decompositions
        self.sites: list[Site] = []
        self.total_flops = 0

    def identity(self) -> str:
        """Return the slots, exclusions and layers of this graph."""
        return repr((sorted(self.slots.items()), sorted(self.excluded.items()), self.layers))

    def transform(self, graph: fx.Graph) -> None:
        """Rewrite every site that has a slot; record all of them."""
        keep_counts = find_keep_counts(graph, self.slot_count)
        found, self.total_flops = find_sites(graph, self.slots, self.excluded)
        for node, site in found:
            self.sites.append(site)
            if not site.reason:
                # Matched anew: what the rewrite of another site replaced may be an input of it.
                match = find_match_maybe(node)
                assert match is not None
                self._rewrite(graph, match, keep_counts, site.slot)

    def _rewrite(self, graph: fx.Graph, match: SiteMatch, keep_counts: fx.Node, slot: int) -> None:
        limit = match.channels // match.groups

        def replacement(keep_counts: Tensor, *tensors: Tensor) -> Any:
            k = cast(int, keep_counts[slot].item())
            torch._check(k >= min(MIN_KEEP_COUNT, limit))
            torch._check(k <= limit)
            gradients = match.backward(k, *tensors)
            # What follows in the graph may be views that only the dense gradient's layout allows.
            return tuple(
                gradient
                if gradient is None or dense is None
                else with_strides(gradient, dense.stride())
                for gradient, dense in zip(gradients, match.dense_gradients, strict=True)
            )

        inputs = [keep_counts, *match.inputs]
        fake_mode = keep_counts.meta["val"].fake_mode
        traced = trace(replacement, inputs, fake_mode, self.decompositions())
        match.replace(splice(graph, match.node, traced, inputs))


def find_sites(
    graph: fx.Graph, slots: Mapping[str, Slot], excluded: Mapping[str, str]
) -> tuple[list[tuple[fx.Node, Site]], int]:
    """Find the sites of a joint graph, and leave the graph as it is.

    Args:
        graph: the joint graph.
        slots: the layers that take part, by name.
        excluded: the layers that do not, by name, with the reason.

    Returns:
        The first node of each site with what is to become of the site, in graph order; and the
        floating-point operations of all backward convolutions and matrix products.
    """
    found: list[tuple[fx.Node, Site]] = []
    total_flops = 0
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        is_forward = node.meta.get("partitioner_tag") == "is_forward"
        if is_forward or node in seen or node.meta.get(INSERTED_KEY):
            continue
        match = find_match_maybe(node)
        total_flops += match.flops if match else matrix_product_flops(node)
        if match is None:
            continue
        seen.update(match.nodes)
        name = layer_name(node)
        reason = why_dense(match, name, slots, excluded)
        slot = -1 if reason else slots[name or ""].index
        site = Site(name or "", match.kind, match.channels, match.groups, match.flops, slot, reason)
        found.append((node, site))
    return found, total_flops


def find_match_maybe(node: fx.Node) -> SiteMatch | None:
    """Return what the first kind of site that recognises the node makes of it."""
    return next((match for matcher in MATCHERS if (match := matcher(node))), None)


def find_keep_counts(graph: fx.Graph, slot_count: int) -> fx.Node:
    """Return the placeholder of the runtime sparsity tensor: the last input of the forward.

    Raises:
        RuntimeError: there is none.
    """
    placeholders: list[fx.Node] = graph.find_nodes(op="placeholder")
    for node in reversed(placeholders):
        val = node.meta["val"]
        if (
            str(node.target).startswith("primals")
            and isinstance(val, Tensor)
            and val.dtype == torch.int64
            and val.shape == (slot_count,)
        ):
            return node
    raise RuntimeError(
        f"the joint graph has no runtime sparsity tensor, int64 [{slot_count}], among its inputs"
    )
