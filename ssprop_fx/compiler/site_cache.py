"""Records of what the pass did to each compiled graph, stored next to Inductor's compile cache.

A hit in the compile cache skips the pass. Then nobody knows which sites the pass rewrote and why
others stayed dense. So a record is stored, under a key made from the same inputs.
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
        sites: every site of the graph.
        total_flops: floating-point operations of all its backward convolutions and matrix
            products if they were dense.
        runs: number of calls.
        whole: with `axis="sample"`, why the backward runs on the whole batch; "" if it runs on the
            kept samples. None with `axis="channel"`.
        patched: number of convolutions that take their gradients from patches.
        patch_flops: FLOPs that this saves in a backward of the whole batch.
    """

    def __init__(self, sites: Sequence[Site] = (), total_flops: int = 0) -> None:
        self.sites = tuple(sites)
        self.total_flops = total_flops
        self.runs = 0
        self.whole: str | None = None
        self.patched = self.patch_flops = 0

    def __str__(self) -> str:
        """Return a text such as `20 sites sparse, 1 dense`."""
        dense = sum(bool(site.reason) for site in self.sites)
        return f"{len(self.sites) - dense} sites sparse, {dense} dense"

    @property
    def is_sliced(self) -> bool:
        """Whether the backward runs on the kept samples."""
        return self.whole == ""

    @property
    def is_sparse(self) -> bool:
        """Whether the backward is sliced, or the pass rewrote any of its sites."""
        return self.is_sliced or any(not site.reason for site in self.sites)


def record_key(gm: fx.GraphModule, inputs: Sequence[Any], identity: str) -> str:
    """Return a cache key for a graph, the shapes of its inputs and the pass.

    Args:
        gm: the graph that Dynamo captured.
        inputs: its example inputs.
        identity: everything else that the pass's result depends on.
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
    """Write a graph's record to disk."""
    content = {"sites": [asdict(s) for s in graph.sites], "total_flops": graph.total_flops}
    write(cache_file("ssprop", key), content)


def load_record_maybe(key: str) -> GraphRecord | None:
    """Return a graph's record; None if it is missing or unreadable."""
    content = read_maybe(cache_file("ssprop", key))
    try:
        sites = [_site(**site) for site in content["sites"]]
        return GraphRecord(sites, content["total_flops"])
    except (KeyError, TypeError):
        return None


def _site(times: dict[str, Any] | None, **values: Any) -> Site:
    return Site(**values, times=None if times is None else Times(**times))
