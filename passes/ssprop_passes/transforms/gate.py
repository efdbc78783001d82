"""Gate: measures sites, and leaves those dense that are not faster sparse.

When a graph is compiled, each site's backward runs dense and sparse on random tensors of its shapes
(`gate_timing`). The times are kept on disk, next to Inductor's compile cache.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx

from ssprop_passes.cache_files import cache_file, read_maybe, write_first
from ssprop_passes.fingerprint import identity_maybe, sources_hash
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.flops import hinted
from ssprop_passes.sites.match import SiteMatch
from ssprop_passes.sites.site import Times
from ssprop_passes.transforms.gate_timing import hinted_strides, measure

__all__ = ["Gate", "why_slower"]


class Gate:
    """Gives the times that decide which sites become sparse.

    Args:
        smallest: keep count of each group at which sites are measured, by slot.
    """

    def __init__(self, smallest: Mapping[int, int]) -> None:
        self.smallest = dict(smallest)

    def times(self, match: SiteMatch, slot: int, selection: Selection) -> Times:
        """Return the times of a site; from disk if it was measured before."""
        k = self.smallest[slot]
        if identity_maybe(selection.select) is None:
            # Do not store: another selector without an identity would find these times.
            return measure(match, k, selection)
        path = cache_file("ssprop-gate", _key(match, k, selection))
        if (known := _times_maybe(read_maybe(path))) is not None:
            return known
        times = measure(match, k, selection)
        return _times_maybe(write_first(path, asdict(times))) or times

    def identity(self) -> str:
        """Return a text that identifies what decisions depend on, except the machine."""
        return repr(sorted(self.smallest.items()))


def why_slower(times: Times, channels: int) -> str:
    """Return why a site should stay dense; "" if it is faster sparse."""
    if times.saved(times.kept, channels) > 0:
        return ""
    return (
        f"not faster sparse: {times.sparse:.2f} ms with {times.kept} channels,"
        f" {times.dense:.2f} ms dense"
    )


def _times_maybe(content: Any) -> Times | None:
    try:
        return Times(**content)
    except TypeError:
        return None


def _key(match: SiteMatch, k: int, selection: Selection) -> str:
    """Return a cache key made from everything that the times depend on."""

    def specification(node: fx.Node) -> Any:
        value = node.meta["val"]
        shape = tuple(hinted(value).shape) if isinstance(value, Tensor) else ()
        return shape, hinted_strides(value), value.dtype, value.device.type

    calls = [(str(n.target), fx.map_arg(n.args, specification)) for n in match.nodes]
    device = match.inputs[0].meta["val"].device
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        torch.get_num_threads(),
        torch.__version__,
        sources_hash(),
    )
    select = identity_maybe(selection.select)
    what = (calls, match.wanted, k, select, selection.gradients, selection.block)
    return hashlib.sha256(repr((what, machine)).encode()).hexdigest()


def _cpu() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
