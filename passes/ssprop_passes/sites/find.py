"""Find the sites of a joint graph."""

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from ssprop_passes.graph.rewrite import INSERTED_KEY
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.flops import matrix_product_flops
from ssprop_passes.sites.match import SiteMatch, why_dense
from ssprop_passes.sites.matchers import MATCHERS
from ssprop_passes.sites.site import Site, Slot, layer_name

__all__ = ["find_match_maybe", "find_sites"]


def find_sites(
    graph: fx.Graph,
    slots: Mapping[str, Slot],
    excluded: Mapping[str, str],
    selection: Selection = Selection(),
) -> tuple[list[tuple[fx.Node, Site]], int]:
    """Find the sites of a joint graph, without changing the graph.

    Args:
        graph: the joint graph.
        slots: layer name -> slot, for the layers that take part.
        excluded: layer name -> reason, for the layers that do not.
        selection: says which gradients are sparse.

    Returns:
        The first node and the `Site` of each site, in graph order; and the FLOPs of all backward
        convolutions and matrix products.
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
        reason = why_dense(match, name, slots, excluded, selection)
        site = Site(
            name or "", match.kind, match.channels, match.groups, match.flops, reason=reason
        )
        if not reason:
            sparse_flops = match.flops_of(selection.sparse(match.wanted))
            site = replace(site, slot=slots[site.name].index, sparse_flops=sparse_flops)
        found.append((node, site))
    return found, total_flops


def find_match_maybe(node: fx.Node) -> SiteMatch | None:
    """Return the match of the first kind of site that recognises the node, None if none does."""
    return next((match for matcher in MATCHERS if (match := matcher(node))), None)
