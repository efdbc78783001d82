"""What a sparse data-parallel step hands to collectives: counted, and timed apart from the rest.

Ranks are gloo processes on this machine; one rank counts bytes and times the packing of rows alone.
"""

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
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
from ssprop_fx.kept_rows import KeptRows, kept_rows_hook

__all__ = ["Communication", "Job", "measure"]

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


@dataclass(frozen=True, kw_only=True)
class Communication:
    """What one rank hands to collectives in a sparse step, and the median times that it waits.

    Attributes:
        gradients: by DistributedDataParallel's plain all-reduce.
        rows: by `kept_rows_hook`, to agree on rows.
        kept: by `kept_rows_hook`, rows and other parameters.
        scores: by the selection that all ranks share.
        gradients_ms, kept_ms: of a step's buckets, one after another; packing included.
        scores_ms: of the scores.
        sizes_ms: of single all-reduces: bytes -> milliseconds.
    """

    gradients: Part
    rows: Part
    kept: Part
    scores: Part
    gradients_ms: float
    kept_ms: float
    scores_ms: float
    sizes_ms: dict[int, float]


def measure(job: Job, ranks: int) -> Communication:
    """Count and time the communication of so many processes; rank 0's times.

    Args:
        job: the step.
        ranks: processes; one is this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        if ranks == 1:
            _run(0, ranks, job, folder)
        else:
            multiprocessing.spawn(_run, (ranks, job, folder), nprocs=ranks)
        return pickle.loads((Path(folder) / "result").read_bytes())


def _run(rank: int, ranks: int, job: Job, folder: str) -> None:
    if ranks > 1:
        torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    try:
        result = _communicate(job)
        if rank == 0:
            (Path(folder) / "result").write_bytes(pickle.dumps(result))
    finally:
        distributed.destroy_process_group()


def _communicate(job: Job) -> Communication:
    torch.manual_seed(0)
    model = timm.create_model(job.model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in model.parameters():
            # Some begin at zero, and so do the gradients of what lies before them.
            parameter += 0.02 * torch.randn_like(parameter)
    config = SparsityConfig(ranks="shared", gate=False, min_channels=job.min_channels)
    scheduler = SparsityScheduler(constant(job.drop_rate))
    # AOT eager: what is timed is none of the compiler's.
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    ddp = DistributedDataParallel(compiled)
    hook = _TimedHook()
    ddp.register_comm_hook(None, hook.run)
    torch.manual_seed(1 + distributed.get_rank())
    images = torch.randn(job.batch_size, 3, job.img_size, job.img_size)
    for _ in range(2 + job.rounds):
        # The first step is slow, and buckets change after it.
        hook.steps.append([])
        model.zero_grad()
        ddp(images).logsumexp(1).mean().backward()
    buckets = hook.steps[-1]
    scores = [torch.zeros(site.channels) for site in report(compiled).sparse_sites]

    def median(field: str) -> float:
        steps = hook.steps[2:]
        return statistics.median(sum(getattr(bucket, field) for bucket in step) for step in steps)

    return Communication(
        gradients=Part(sum(bucket.gradients for bucket in buckets), len(buckets)),
        rows=Part(
            sum(bucket.rows for bucket in buckets), sum(bucket.rows > 0 for bucket in buckets)
        ),
        kept=Part(sum(bucket.sent - bucket.rows for bucket in buckets), len(buckets)),
        scores=Part(sum(score.nbytes for score in scores), len(scores)),
        gradients_ms=median("gradients_ms"),
        kept_ms=median("kept_ms"),
        scores_ms=_median_ms(job.rounds, scores),
        sizes_ms={size: _median_ms(job.rounds, [torch.zeros(size // 4)]) for size in SIZES},
    )


@dataclass(frozen=True)
class _Bucket:
    """One bucket: bytes of its gradients, of rows to agree on, of all that is sent, and times."""

    gradients: int
    rows: int
    sent: int
    gradients_ms: float
    kept_ms: float


class _TimedHook:
    """A communication hook that averages each bucket both ways, and waits for either.

    Attributes:
        steps: the buckets of each step.
    """

    def __init__(self) -> None:
        self.steps: list[list[_Bucket]] = []

    def run(self, state: object, bucket: distributed.GradBucket) -> Future[Tensor]:
        """Average a bucket."""
        kept_rows, buffer = KeptRows(), bucket.buffer()
        before = buffer.clone()
        gradients_ms = _timed_ms(lambda: allreduce_hook(None, bucket).wait())
        buffer.copy_(before)
        kept_ms = _timed_ms(lambda: kept_rows_hook(kept_rows, bucket).wait())
        rows = sum(gradient.shape[0] for gradient in bucket.gradients() if gradient.ndim > 1)
        made = _Bucket(buffer.nbytes, rows, kept_rows.sent_bytes, gradients_ms, kept_ms)
        self.steps[-1].append(made)
        done: Future[Tensor] = Future()
        done.set_result(buffer)
        return done


def _median_ms(rounds: int, tensors: Sequence[Tensor]) -> float:
    """Return the median time of all-reduces of these tensors, one after another."""

    def reduce() -> None:
        for tensor in tensors:
            distributed.all_reduce(tensor)

    reduce()
    return statistics.median(_timed_ms(reduce) for _ in range(rounds))


def _timed_ms(function: Callable[[], Any]) -> float:
    """Return how long a function takes on this rank, where all ranks begin together."""
    distributed.barrier()
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3
