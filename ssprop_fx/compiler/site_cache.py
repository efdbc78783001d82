"""What the pass did to each compiled graph, kept beside Inductor's compile cache.

A hit in the compile cache skips the pass, and with it everything that the pass knows: which sites
it rewrote and why others stayed dense. So it is written down under a key of the same inputs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from ssprop_passes.cache_files import cache_file, read_maybe, write
from ssprop_passes.sites.site import Site, Times
from torch import fx

__all__ = ["GraphRecord", "load_record_maybe", "record_key", "save_record"]


class GraphRecord:
    """What the pass did to one compiled graph of the sparse variant.

    Attributes:
        sites: every convolution backward of the graph.
        total_flops: floating-point operations of all its backward convolutions and matrix
            products, were they dense.
        runs: how often it was called.
    """

    def __init__(self, sites: Sequence[Site] = (), total_flops: int = 0) -> None:
        self.sites = tuple(sites)
        self.total_flops = total_flops
        self.runs = 0

    def __str__(self) -> str:
        """Such as `20 sites sparse, 1 dense`."""
        dense = sum(bool(site.reason) for site in self.sites)
        return f"{len(self.sites) - dense} sites sparse, {dense} dense"

    @property
    def is_sparse(self) -> bool:
        """Whether any site of the graph was rewritten."""
        return any(not site.reason for site in self.sites)


def record_key(gm: fx.GraphModule, inputs: Sequence[Any], identity: str) -> str:
    """Return a key of a graph, its inputs' shapes and the identity of the pass on it.

    Args:
        gm: the graph as Dynamo captured it.
        inputs: its example inputs.
        identity: what else the pass's result depends on.
    """
    shapes = [
        (str(x.dtype), tuple(map(str, x.shape)), tuple(map(str, x.stride())), x.requires_grad)
        if isinstance(x, torch.Tensor)
        else str(x)
        for x in inputs
    ]
    code = gm.print_readable(print_output=False, include_stride=False)
    return hashlib.sha256(repr((code, shapes, identity)).encode()).hexdigest()


def save_record(key: str, graph: GraphRecord) -> None:
    """Write a graph's record to the disk."""
    content = {"sites": [asdict(s) for s in graph.sites], "total_flops": graph.total_flops}
    write(cache_file("ssprop", key), content)


def load_record_maybe(key: str) -> GraphRecord | None:
    """Return the graph's record, None if there is none that can be read."""
    content = read_maybe(cache_file("ssprop", key))
    try:
        sites = [_site(**site) for site in content["sites"]]
        return GraphRecord(sites, content["total_flops"])
    except (KeyError, TypeError):
        return None


def _site(times: dict[str, Any] | None, **values: Any) -> Site:
    return Site(**values, times=None if times is None else Times(**times))
