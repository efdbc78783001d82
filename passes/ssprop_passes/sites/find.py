"""Find the sites of a joint graph."""

from collections.abc import Container, Mapping
from dataclasses import replace

from torch import Tensor, fx

from ssprop_passes.graph.rewrite import INSERTED_KEY
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.flops import matrix_product_flops, size_hint
from ssprop_passes.sites.match import UNKNOWN, SiteMatch, why_dense
from ssprop_passes.sites.matchers import MATCHERS
from ssprop_passes.sites.site import Site, Slot, layer_name

__all__ = ["find_match_maybe", "find_sites"]


def find_sites(
    graph: fx.Graph,
    slots: Mapping[str, Slot],
    excluded: Mapping[str, str],
    selection: Selection = Selection(),
    trained: Container[str] = (),
) -> tuple[list[tuple[fx.Node, Site]], int]:
    """Find the sites of a joint graph, without changing the graph.

    Args:
        graph: the joint graph.
        slots: layer name -> slot, for the layers that take part.
        excluded: layer name -> reason, for the layers that do not.
        selection: says which gradients are sparse.
        trained: names of the layers whose weights get a gradient.

    Returns:
        The first node and the `Site` of each site, in graph order; and the FLOPs of all backward
        convolutions and matrix products. A layer with a backward that no kind of site knows is a
        dense site.
    """
    found: list[tuple[fx.Node, Site]] = []
    total_flops = 0
    seen: set[fx.Node] = set()
    unknown: dict[str, fx.Node] = {}
    for node in graph.nodes:
        is_forward = node.meta.get("partitioner_tag") == "is_forward"
        if is_forward or node in seen or node.meta.get(INSERTED_KEY):
            continue
        name, match = layer_name(node), find_match_maybe(node)
        flops = match.flops if match else matrix_product_flops(node)
        total_flops += flops
        if match is None:
            if name is None:
                continue
            if flops and (name in slots or name in excluded):
                unknown[name] = node
            elif name in slots and name in trained:
                unknown.setdefault(name, node)
            continue
        seen.update(match.nodes)
        reason = why_dense(match, name, slots, excluded, selection)
        site = Site(
            name or "", match.kind, match.channels, match.groups, match.flops, reason=reason
        )
        if not reason:
            sparse_flops = match.flops_of(selection.sparse(match.wanted))
            site = replace(site, slot=slots[site.name].index, sparse_flops=sparse_flops)
        found.append((node, site))
    known = {site.name for _, site in found}
    for name, node in unknown.items():
        if name not in known:
            found.append((node, _unknown_site(name, node, slots, excluded)))
    return found, total_flops


def _unknown_site(
    name: str, node: fx.Node, slots: Mapping[str, Slot], excluded: Mapping[str, str]
) -> Site:
    """Return the site of a layer that has a backward product, but none that a matcher knows."""
    value = node.meta["val"]
    if name in slots:
        channels = slots[name].channels
    else:
        channels = size_hint((value if isinstance(value, Tensor) else value[0]).shape[-1])
    reason = excluded.get(name, UNKNOWN)
    return Site(name, "product", channels, 1, matrix_product_flops(node), reason=reason)


def find_match_maybe(node: fx.Node) -> SiteMatch | None:
    """Return the match of the first kind of site that recognises the node, None if none does."""
    return next((match for matcher in MATCHERS if (match := matcher(node))), None)
