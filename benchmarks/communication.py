"""What a sparse data-parallel step hands to collectives: counted, and timed apart from the rest.

One rank trains a sparse step, counts bytes and times the packing of rows. Several, gloo processes
on this machine, send what that one would have sent.
"""

import pickle
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, distributed, multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scale_model import Part
from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.integrations.ddp import KeptRows, kept_rows_hook

__all__ = ["Communication", "Job", "Kept", "measure"]

# Bytes of the all-reduces that a network is fitted to.
SIZES = tuple(4**power for power in range(6, 14))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure; the resolution and batch size change no gradient's shape.

    Attributes:
        model: timm model.
        drop_rate: of the step.
        img_size, batch_size: of its input.
        rounds: timed steps and all-reduces of each kind.
        min_channels: of layers that take part.
    """

    model: str
    drop_rate: float
    img_size: int = 64
    batch_size: int = 4
    rounds: int = 5
    min_channels: int = SparsityConfig.min_channels


@dataclass(frozen=True)
class Kept:
    """What a sparse step kept.

    Attributes:
        rows: name of each parameter -> which rows of its gradient are not zero.
        channels: of each layer that is sparse.
    """

    rows: dict[str, Tensor]
    channels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Communication:
    """What one rank hands to collectives in a sparse step, and the shortest times that it waits.

    The shortest, because whatever else runs on the machine only ever adds.

    Attributes:
        gradients: by DistributedDataParallel's plain all-reduce.
        rows: by `kept_rows_hook`, to agree on rows.
        kept: by `kept_rows_hook`, rows and other parameters.
        scores: by the selection that all ranks share.
        gradients_ms, kept_ms: of a step's buckets, one after another; packing included.
        packing_ms: what the processor does for `kept_ms` and not for `gradients_ms`.
        scores_ms: of the scores.
        sizes_ms: of single all-reduces: bytes -> milliseconds.
        what: was kept.
    """

    gradients: Part
    rows: Part
    kept: Part
    scores: Part
    gradients_ms: float
    kept_ms: float
    packing_ms: float
    scores_ms: float
    sizes_ms: dict[int, float]
    what: Kept


def measure(job: Job, ranks: int = 1, kept: Kept | None = None) -> Communication:
    """Count and time the communication of so many processes; rank 0's times.

    Args:
        job: the step.
        ranks: processes; one is this process.
        kept: what to send; by default what a sparse step keeps.
    """
    with tempfile.TemporaryDirectory() as folder:
        if ranks == 1:
            _run(0, ranks, job, kept, folder)
        else:
            multiprocessing.spawn(_run, (ranks, job, kept, folder), nprocs=ranks)
        return pickle.loads((Path(folder) / "result").read_bytes())


def _run(rank: int, ranks: int, job: Job, kept: Kept | None, folder: str) -> None:
    if ranks > 1:
        torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        result = _communicate(job, kept)
        if rank == 0:
            (Path(folder) / "result").write_bytes(pickle.dumps(result))
    finally:
        distributed.destroy_process_group()


def _communicate(job: Job, kept: Kept | None) -> Communication:
    torch.manual_seed(0)
    model = timm.create_model(job.model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in model.parameters():
            # Some begin at zero, and so do the gradients of what lies before them.
            parameter += 0.02 * torch.randn_like(parameter)
    network = model
    if kept is None:
        config = SparsityConfig(ranks="shared", gate=False, min_channels=job.min_channels)
        scheduler = SparsityScheduler(constant(job.drop_rate))
        # AOT eager: what is timed is none of the compiler's.
        network = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    ddp = DistributedDataParallel(network)
    hook = _TimedHook({p: kept.rows[name] for name, p in model.named_parameters()} if kept else {})
    ddp.register_comm_hook(None, hook.run)
    torch.manual_seed(1 + distributed.get_rank())
    images = torch.randn(job.batch_size, 3, job.img_size, job.img_size)
    for _ in range(2 + job.rounds):
        # The first step is slow, and buckets change after it.
        hook.steps.append([])
        model.zero_grad()
        ddp(images).logsumexp(1).mean().backward()
    buckets = hook.steps[-1]
    if kept is None:
        rows = {name: _held(p.grad) for name, p in model.named_parameters()}
        kept = Kept(rows, tuple(site.channels for site in report(network).sparse_sites))
    scores = [torch.zeros(channels) for channels in kept.channels]
    sizes = [torch.zeros(size // 4) for size in SIZES]

    def shortest(field: str) -> float:
        steps = hook.steps[2:]
        # Of each bucket: no whole step may have been undisturbed.
        return sum(min(getattr(b, field) for b in times) for times in zip(*steps, strict=True))

    return Communication(
        gradients=Part(sum(bucket.gradients for bucket in buckets), len(buckets)),
        rows=Part(
            sum(bucket.rows for bucket in buckets), sum(bucket.rows > 0 for bucket in buckets)
        ),
        kept=Part(sum(bucket.sent - bucket.rows for bucket in buckets), len(buckets)),
        scores=Part(sum(score.nbytes for score in scores), len(scores)),
        gradients_ms=shortest("gradients_ms"),
        kept_ms=shortest("kept_ms"),
        packing_ms=shortest("packing_ms"),
        scores_ms=sum(_shortest_ms(job.rounds, scores)),
        sizes_ms=dict(zip(SIZES, _shortest_ms(job.rounds, sizes), strict=True)),
        what=kept,
    )


@dataclass(frozen=True)
class _Bucket:
    """One bucket: bytes of its gradients, of rows to agree on, of all that is sent, and times."""

    gradients: int
    rows: int
    sent: int
    gradients_ms: float
    kept_ms: float
    packing_ms: float


class _TimedHook:
    """A communication hook that averages each bucket both ways, and waits for either.

    Args:
        held: rows of each parameter's gradient that are not to be zero; empty for those that are.

    Attributes:
        steps: the buckets of each step.
    """

    def __init__(self, held: Mapping[Tensor, Tensor]) -> None:
        self._held = held
        self.steps: list[list[_Bucket]] = []

    def run(self, state: object, bucket: distributed.GradBucket) -> Future[Tensor]:
        """Average a bucket."""
        kept_rows, buffer, gradients = KeptRows(), bucket.buffer(), bucket.gradients()
        if self._held:
            for parameter, gradient in zip(bucket.parameters(), gradients, strict=True):
                gradient[~self._held[parameter]] = 0
        before = buffer.clone()
        gradients_ms, own_ms = _timed_ms(lambda: allreduce_hook(None, bucket).wait())
        buffer.copy_(before)
        kept_ms, packing_ms = _timed_ms(lambda: kept_rows_hook(kept_rows, bucket).wait())
        self.steps[-1].append(
            _Bucket(
                buffer.nbytes,
                sum(gradient.shape[0] for gradient in gradients if gradient.ndim > 1),
                kept_rows.sent_bytes,
                gradients_ms,
                kept_ms,
                packing_ms - own_ms,
            )
        )
        done: Future[Tensor] = Future()
        done.set_result(buffer)
        return done


def _held(gradient: Tensor) -> Tensor:
    """Return which rows are not zero; of a vector all are sent."""
    is_table = gradient.ndim > 1
    return gradient.flatten(1).any(1) if is_table else torch.ones(len(gradient), dtype=torch.bool)


def _shortest_ms(rounds: int, tensors: Sequence[Tensor]) -> list[float]:
    """Return the shortest time of each tensor's all-reduce.

    All of them in each round: a machine that is busy for a while is so for all, and for few rounds.
    """

    def all_reduce_ms(tensor: Tensor) -> float:
        return _timed_ms(lambda: distributed.all_reduce(tensor))[0]

    times = [[all_reduce_ms(tensor) for tensor in tensors] for _ in range(1 + rounds)]
    return [min(of_one) for of_one in zip(*times[1:], strict=True)]


def _timed_ms(function: Callable[[], Any]) -> tuple[float, float]:
    """Return how long a function takes on this rank, where all ranks begin together.

    Returns:
        Milliseconds, and those of the processor, all threads together.
    """
    distributed.barrier()
    start, start_of_work = time.perf_counter(), time.process_time()
    function()
    return (time.perf_counter() - start) * 1e3, (time.process_time() - start_of_work) * 1e3
