"""Counts the bytes that a rank sends in a sparse data-parallel step, and times the packing.

One process trains a few steps under DistributedDataParallel and averages each bucket of gradients
twice: like a plain step, and with `kept_rows_hook`. Nothing leaves the process.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.integrations.ddp import KeptRows, kept_rows_hook

__all__ = ["Communication", "measure"]

# The first step is slow, and DistributedDataParallel changes its buckets afterwards.
_WARMUP = 2


@dataclass(frozen=True, kw_only=True)
class Communication:
    """What a rank passes to all-reduces in one sparse step.

    Attributes:
        gradient_bytes: bytes of all gradients.
        buckets: number of all-reduces for the gradients.
        kept_bytes: bytes of the kept rows and of the gradients that have no rows to drop.
        row_bytes: bytes to agree on the kept rows.
        score_bytes: bytes to agree on the scores, if all ranks share one selection.
        layers: number of all-reduces for the scores.
        packing_ms: processor time of all threads to gather and scatter kept rows.
    """

    gradient_bytes: int
    buckets: int
    kept_bytes: int
    row_bytes: int
    score_bytes: int
    layers: int
    packing_ms: float


def measure(
    model_name: str,
    drop_rate: float,
    min_channels: int = SparsityConfig.min_channels,
    rounds: int = 9,
) -> Communication:
    """Count what a step sends, and time the packing.

    Args:
        model_name: timm model.
        drop_rate: drop rate of the step.
        min_channels: smallest number of channels of a layer that takes part.
        rounds: timed steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            return _measure(model_name, drop_rate, min_channels, rounds)
        finally:
            distributed.destroy_process_group()


def _measure(model_name: str, drop_rate: float, min_channels: int, rounds: int) -> Communication:
    torch.manual_seed(0)
    model = timm.create_model(model_name).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in model.parameters():
            # Some parameters start at zero, which makes the gradients of earlier layers zero.
            parameter += 0.02 * torch.randn_like(parameter)
    config = SparsityConfig(ranks="shared", gate=False, min_channels=min_channels)
    # AOT eager: the timed code is not compiled.
    compiled = ssprop_compile(
        model, SparsityScheduler(constant(drop_rate)), config=config, backend="aot_eager"
    )
    ddp = DistributedDataParallel(compiled)
    hook = _Hook()
    ddp.register_comm_hook(None, hook.run)
    # Resolution and batch size change no gradient's shape.
    images = torch.randn(4, 3, 64, 64)
    for _ in range(_WARMUP + rounds):
        hook.steps.append([])
        model.zero_grad()
        ddp(images).logsumexp(1).mean().backward()
    steps = hook.steps[_WARMUP:]
    channels = [site.channels for site in report(compiled).sparse_sites]
    row_bytes = sum(bucket.row_bytes for bucket in steps[-1])
    return Communication(
        gradient_bytes=sum(bucket.gradient_bytes for bucket in steps[-1]),
        buckets=len(steps[-1]),
        kept_bytes=sum(bucket.sent_bytes for bucket in steps[-1]) - row_bytes,
        row_bytes=row_bytes,
        score_bytes=sum(channels) * torch.float32.itemsize,
        layers=len(channels),
        # The shortest time of each bucket, because other load on the machine can only add time.
        packing_ms=sum(min(b.packing_ms for b in same) for same in zip(*steps, strict=True)),
    )


@dataclass(frozen=True)
class _Bucket:
    gradient_bytes: int
    row_bytes: int
    sent_bytes: int
    packing_ms: float


class _Hook:
    """A communication hook that averages each bucket both ways.

    Attributes:
        steps: the buckets of each step.
    """

    def __init__(self) -> None:
        self.steps: list[list[_Bucket]] = []

    def run(self, state: object, bucket: distributed.GradBucket) -> Future[Tensor]:
        """Average a bucket."""
        kept_rows, buffer = KeptRows(), bucket.buffer()
        before = buffer.clone()
        plain_ms = _processor_ms(lambda: allreduce_hook(None, bucket).wait())
        buffer.copy_(before)
        kept_ms = _processor_ms(lambda: kept_rows_hook(kept_rows, bucket).wait())
        self.steps[-1].append(
            _Bucket(
                gradient_bytes=buffer.nbytes,
                # One byte per row; vectors have no rows to drop.
                row_bytes=sum(g.shape[0] for g in bucket.gradients() if g.ndim > 1),
                sent_bytes=kept_rows.sent_bytes,
                packing_ms=kept_ms - plain_ms,
            )
        )
        done: Future[Tensor] = Future()
        done.set_result(buffer)
        return done


def _processor_ms(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return (time.process_time() - start) * 1e3
