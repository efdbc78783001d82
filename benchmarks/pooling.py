"""`python -m benchmarks pooling`: 1-D networks with a global max pooling, dense and by the winners.

Rows: dense torch.compile of the model, and the same with `GlobalMaxPass`, whose gradient is exact.

    error    largest difference between the gradients of the two, over the largest gradient of the
             same parameter
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.machine import describe, environment
from benchmarks.results import save, table
from benchmarks.timing import Timing, alternate
from ssprop_fx import GlobalMaxPass

__all__ = ["MODELS", "MalConv", "PoolingRow", "TextCnn", "add_parser", "measure"]

FORMATS = {
    "model": "",
    "length": "d",
    "dense_ms": ".1f",
    "winners_ms": ".1f",
    "speedup": ".2f",
    "speedup_low": ".2f",
    "speedup_high": ".2f",
    "error": ".0e",
}


class MalConv(nn.Module):
    """Embedded bytes, a gated convolution of wide windows, global max pooling (Raff et al., 2018).

    Args:
        channels: of the convolution.
        window: its size and its stride.
    """

    def __init__(self, channels: int = 128, window: int = 500) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 8, padding_idx=0)
        self.conv, self.gate = (nn.Conv1d(8, channels, window, stride=window) for _ in range(2))
        self.hidden = nn.Linear(channels, channels)
        self.head = nn.Linear(channels, 2)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits [N, 2] of bytes, int64 [N, L]."""
        x = self.embedding(words).transpose(1, 2)
        x = self.conv(x) * torch.sigmoid(self.gate(x))
        x = functional.max_pool1d(x, x.shape[2])[:, :, 0]
        logits: Tensor = self.head(torch.relu(self.hidden(x)))
        return logits


class TextCnn(nn.Module):
    """Convolutions of three widths over embedded words, max over time (Kim, EMNLP 2014)."""

    def __init__(self, channels: int = 100, widths: tuple[int, ...] = (3, 4, 5)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 128)
        self.convs = nn.ModuleList(nn.Conv1d(128, channels, width) for width in widths)
        self.head = nn.Linear(channels * len(widths), 2)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits [N, 2] of words, int64 [N, L]."""
        x = self.embedding(words).transpose(1, 2)
        pooled = [torch.relu(conv(x)).max(2).values for conv in self.convs]
        logits: Tensor = self.head(torch.cat(pooled, 1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {"malconv": MalConv, "textcnn": TextCnn}


@dataclass(frozen=True, kw_only=True)
class PoolingRow:
    """A model at one length of its input; medians over rounds.

    Attributes:
        model: name and batch size.
        length: positions of the input.
        dense_ms, winners_ms: milliseconds of forward and backward.
        speedup: of each round, its median.
        speedup_low, speedup_high: its 95 % confidence interval.
        error: see above.
        clock: what was measured.
    """

    model: str
    length: int
    dense_ms: float
    winners_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    error: float
    clock: str


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "pooling",
        help="exact backward of convolutions under a global max pooling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 65536])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time")
    parser.add_argument("--output", help="folder for a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table."""
    rows = [
        measure(name, length, args.batch_size, args.rounds, args.cpu_time)
        for name in args.models
        for length in args.lengths
    ]
    print(table(rows, FORMATS))
    print(describe("cpu"))
    if args.output:
        save(rows, environment("cpu"), args.output, "pooling")


def measure(
    name: str, length: int, batch_size: int, rounds: int, with_cpu_time: bool = False
) -> PoolingRow:
    """Measure a model at one length.

    Args:
        name: a key of `MODELS`.
        length: positions of the input.
        batch_size: inputs in a batch.
        rounds: timed steps of each variant.
        with_cpu_time: measure processor time in place of wall time.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    models = {"dense": MODELS[name]()}
    models["winners"] = copy.deepcopy(models["dense"])
    options = {"winners": {"options": {"joint_custom_pre_pass": GlobalMaxPass()}}, "dense": {}}
    words = torch.randint(1, 257, (batch_size, length))

    def step_of(kind: str) -> Callable[[], None]:
        compiled = torch.compile(models[kind], dynamic=False, **options[kind])

        def step() -> None:
            models[kind].zero_grad()
            compiled(words).square().sum().backward()

        return step

    clock = time.process_time if with_cpu_time else time.perf_counter
    timings = alternate({kind: step_of(kind) for kind in models}, rounds, warmup=2, clock=clock)
    speedup: Timing = timings["dense"].over(timings["winners"])
    pairs = zip(models["dense"].parameters(), models["winners"].parameters(), strict=True)
    return PoolingRow(
        model=f"{name} b{batch_size}",
        length=length,
        dense_ms=timings["dense"].median,
        winners_ms=timings["winners"].median,
        speedup=speedup.median,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        error=max(_error(dense.grad, winners.grad) for dense, winners in pairs),
        clock="processor time" if with_cpu_time else "wall time",
    )


def _error(dense: Tensor | None, winners: Tensor | None) -> float:
    assert dense is not None
    assert winners is not None
    return float((dense - winners).abs().max() / dense.abs().max())
