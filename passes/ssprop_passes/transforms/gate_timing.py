"""Gate timing: times a site's backward, dense and sparse, on random tensors.

The sparse backward runs eagerly, except the scores and the gather of channels. Eagerly these two
take several times as long as Inductor's kernels, which are bound by reading grad_output. So each of
the two is replaced by one read of grad_output. On a CPU one thread runs its share of the batch: on
a busy machine threads wait for each other, and such times say little about either backward.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx

from ssprop_passes.graph.modes import outside_modes
from ssprop_passes.selection.gather_scatter import gather_channels, scale_channels
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.flops import hinted, size_hint
from ssprop_passes.sites.match import SiteMatch
from ssprop_passes.sites.site import Times

__all__ = ["hinted_strides", "measure"]

# Runs of each backward. The first does not count; the quickest of the others does. If a run takes
# long, one other is enough, because a short disturbance then matters little.
_RUNS, _LONG_MS = 3, 10

# How many random numbers to draw for a tensor. A prime number, so that no two channels are alike.
_DRAWN = 65_521


def measure(match: SiteMatch, k: int, selection: Selection) -> Times:
    """Run a site's backward, dense and sparse, on random tensors.

    Args:
        match: the site.
        k: keep count of each group.
        selection: how channels are chosen; here from random scores.

    Returns:
        The times.
    """
    device = match.inputs[0].meta["val"].device
    cuda = [device] if device.type == "cuda" else []
    with (
        outside_modes(),
        torch.no_grad(),
        torch.random.fork_rng(cuda),
        _one_thread(device) as shares,
    ):
        grad_output, input_, weight = (node.meta["val"] for node in match.inputs)
        tensors = [
            _random_like(grad_output, shares),
            _random_like(input_, shares),
            _random_like(weight),
        ]
        values = dict(zip(match.inputs, tensors, strict=True))
        dense = _time_ms(lambda: [_evaluate(node, dict(values)) for node in match.nodes], device)
        settings = {f.name: getattr(selection, f.name) for f in fields(selection)}
        known = _Known(**settings, scores=torch.rand(match.channels, device=device))
        sparse = _time_ms(lambda: match.backward(k, known, *tensors), device)
    return Times(dense, sparse, k * match.groups)


@dataclass(frozen=True, kw_only=True)
class _Known(Selection):
    """Selects by known scores; gathers only in its first call, which is not timed."""

    scores: Tensor
    gathered: list[Tensor] = field(default_factory=list)

    def keep(
        self,
        grad_output: Tensor,
        weight: Tensor,
        k: int,
        groups: int = 1,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read `grad_output` once for the scores and once for the gather; return a known result."""
        indices, weights = self.choose(self.scores, k, groups)
        if not self.gathered:
            self.gathered.append(gather_channels(grad_output, indices))
        for _ in ("scores", "gather"):
            grad_output.sum()
        (kept,) = self.gathered
        return kept if weights is None else scale_channels(kept, weights), indices


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    times: list[float] = []
    while len(times) < 2 or (len(times) < _RUNS and times[-1] < _LONG_MS):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Return the value of a node, given the values that it depends on."""
    if node not in values:
        assert callable(node.target)
        for operand in node.all_input_nodes:
            _evaluate(operand, values)
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)
    return values[node]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[int]:
    """Use one thread on a CPU; yield the number of threads that normally share a batch."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _random_like(value: Tensor, shares: int = 1) -> Tensor:
    """Return random numbers with the layout of a fake tensor, for one share of its batch."""
    sizes, strides = list(hinted(value).shape), hinted_strides(value)
    sizes[0] = -(-sizes[0] // shares)
    count = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    # Repeat the same numbers: drawing so many would take longer than the runs.
    drawn = torch.randn(min(count, _DRAWN), dtype=value.dtype, device=value.device)
    return drawn.repeat(-(-count // len(drawn))).as_strided(sizes, strides)


def hinted_strides(value: Tensor) -> list[int]:
    """Return the strides of a fake tensor as plain numbers."""
    return [size_hint(stride) for stride in value.stride()]
