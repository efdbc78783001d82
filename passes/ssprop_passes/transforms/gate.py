"""Gate: leaves the sites dense that are not faster sparse, by measurement.

Each site's backward is run on random tensors of its shapes, dense and sparse, while the graph is
compiled, and the times are kept on disk beside Inductor's compile cache. The sparse backward is run
eagerly, but for the scores and the gather of channels: eagerly these take several times what
Inductor's kernels do, which are bound by reading grad_output, so for each of the two it is read
once. On a CPU one thread runs its share of the batch: threads that wait for each other on a busy
machine would say little of either backward.

Private torch: the modes of a compilation, which must not see these runs.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils._python_dispatch import _disable_current_modes

from ssprop_passes.fingerprint import identity_maybe, sources_hash
from ssprop_passes.selection.error_feedback import NOTHING, Remembered
from ssprop_passes.selection.policy import Selection, gather_channels, scale_channels
from ssprop_passes.selection.samples import Samples
from ssprop_passes.sites.site import SiteMatch, Times, hinted, size_hint

__all__ = ["Gate", "measure", "why_slower"]

# Runs of each backward: the first is not counted, the quickest of the others is. Where it takes
# long, one other is enough: what disturbs a run for a moment weighs little then.
_RUNS, _LONG_MS = 3, 10

# Random numbers drawn for a tensor: a prime number, so that no two channels are alike.
_DRAWN = 65_521


class Gate:
    """Says which sites are worth making sparse.

    Args:
        keep_counts: keep count, of each group, to decide at, by slot.
    """

    def __init__(self, keep_counts: Mapping[int, int]) -> None:
        self.keep_counts = dict(keep_counts)

    def times(
        self, match: SiteMatch, slot: int, selection: Selection, batch: int | None = None
    ) -> Times:
        """Return the times of a site, from disk if it was measured before."""
        k = self.keep_counts[slot]
        path = Path(cache_dir()) / "ssprop-gate" / f"{_key(match, k, selection, batch)}.json"
        return _load_maybe(path) or _save_first(measure(match, k, selection, batch), path)

    def identity(self) -> str:
        """Return what the decisions depend on, besides the machine."""
        return repr(sorted(self.keep_counts.items()))


def why_slower(times: Times, channels: int, axis: str = "channel") -> str:
    """Return why a site is to stay dense, "" if it is faster sparse."""
    if times.saved(times.kept, channels) > 0:
        return ""
    return (
        f"not faster sparse: {times.sparse:.2f} ms with {times.kept} {axis}s,"
        f" {times.dense:.2f} ms dense"
    )


def measure(match: SiteMatch, k: int, selection: Selection, batch: int | None = None) -> Times:
    """Run a site's backward, dense and sparse, on random tensors.

    Args:
        match: the site.
        k: keep count of each group.
        selection: how channels are chosen, here from random scores.
        batch: samples of the batch, where k is of those.

    Returns:
        The times.
    """
    device = match.inputs[0].meta["val"].device
    cuda = [device] if device.type == "cuda" else []
    with (
        _disable_current_modes(),
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
        if batch is None:
            settings = {f.name: getattr(selection, f.name) for f in fields(selection)}
            known = _Known(**settings, scores=torch.rand(match.channels, device=device))
            sparse = _time_ms(lambda: match.backward_of_parts(k, known, *tensors), device)
        else:
            # As many rows as they have, without regard to where a sample ends.
            rows = tensors[0].shape[0]
            samples = Samples(torch.randperm(rows, device=device)[: max(k * rows // batch, 1)])
            sparse = _time_ms(
                lambda: match.backward_of_samples(samples, selection, *tensors), device
            )
    return Times(dense, sparse, k if batch else k * match.groups)


@dataclass(frozen=True, kw_only=True)
class _Known(Selection):
    """Selects by known scores, and gathers in its first call alone, which is not timed."""

    scores: Tensor
    gathered: list[Tensor] = field(default_factory=list)

    def keep(
        self,
        grad_output: Tensor,
        weight: Tensor,
        k: int,
        groups: int = 1,
        memory: Remembered = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """Read `grad_output` as often as scores and the gather would; return what was gathered."""
        indices, weights = self.choose(self.scores, k, groups)
        if not self.gathered:
            self.gathered.append(gather_channels(grad_output, indices))
        for _ in ("scores", "gather"):
            grad_output.sum()
        (kept,) = self.gathered
        return kept if weights is None else scale_channels(kept, weights), indices


def _load_maybe(path: Path) -> Times | None:
    try:
        return Times(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _save_first(times: Times, path: Path) -> Times:
    """Write times to the disk, whole or not at all, and return those that are there then.

    Of processes that have measured at the same time the first one's hold: all must decide alike,
    as any of them will find what another compiled.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(asdict(times), file)
    try:
        os.link(file.name, path)
    except OSError:
        known = _load_maybe(path)
        if known is None:
            # What is there cannot be read, or the file system has no links.
            os.replace(file.name, path)
            return times
        times = known
    os.unlink(file.name)
    return times


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
    """Return the value of a node, given those that it depends on."""
    if node not in values:
        assert callable(node.target)
        for operand in node.all_input_nodes:
            _evaluate(operand, values)
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = node.target(*args, **kwargs)
    return values[node]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[int]:
    """Run one thread on a CPU; give the number of threads that share a batch otherwise."""
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
    """Return random numbers of the layout of a fake tensor, of one share of its batch."""
    sizes, strides = list(hinted(value).shape), _hinted_strides(value)
    sizes[0] = -(-sizes[0] // shares)
    count = 1 + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    # The same numbers again and again: to draw as many takes longer than the runs do.
    drawn = torch.randn(min(count, _DRAWN), dtype=value.dtype, device=value.device)
    return drawn.repeat(-(-count // len(drawn))).as_strided(sizes, strides)


def _hinted_strides(value: Tensor) -> list[int]:
    return [size_hint(stride) for stride in value.stride()]


def _key(match: SiteMatch, k: int, selection: Selection, batch: int | None) -> str:
    """Return a key of all that the times depend on."""

    def specification(node: fx.Node) -> Any:
        value = node.meta["val"]
        shape = tuple(hinted(value).shape) if isinstance(value, Tensor) else ()
        return shape, _hinted_strides(value), value.dtype, value.device.type

    calls = [(str(n.target), fx.map_arg(n.args, specification)) for n in match.nodes]
    device = match.inputs[0].meta["val"].device
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        torch.get_num_threads(),
        torch.__version__,
        sources_hash(),
    )
    select = identity_maybe(selection.select)
    is_split = selection.input_score is not None
    what = (calls, match.wanted, k, select, selection.gradients, selection.block, batch, is_split)
    return hashlib.sha256(repr((what, machine)).encode()).hexdigest()


def _cpu() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
