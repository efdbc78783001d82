"""`python -m benchmarks long`: does memory or the number of graphs grow in a long run?

Trains a small model on scikit-learn's digits with SGD. Dense and sparse epochs alternate, each with
a short last batch and an evaluation. Prints memory and captured graphs after each epoch. During the
first two cycles of the schedule everything compiles and memory pools fill; after that, neither
should grow.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from benchmarks.results import table
from ssprop_fx import SparsityConfig, SparsityScheduler, bar, ssprop_compile

__all__ = ["EpochRow", "add_parser", "growth", "measure"]

FORMATS = {"epoch": "", "steps": "", "drop_rate": ".2f", "rss_mib": ".1f", "graphs": ""}
WARMUP = 4
# Fraction of the memory after the warm-up. A leak of one activation per step is far more.
TOLERANCE = 0.01
_IMAGE = 32


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch.

    Attributes:
        epoch: number of the epoch, from 0.
        steps: training steps so far, including this epoch.
        drop_rate: drop rate at the start of the epoch.
        rss_mib: resident memory of the process at the epoch's end, MiB.
        graphs: graphs that Dynamo has captured in the process so far.
    """

    epoch: int
    steps: int
    drop_rate: float
    rss_mib: float
    graphs: int


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "long",
        help="memory and graphs over thousands of steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="test_resnet", help="timm model (default: test_resnet)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--check", action="store_true", help="exit status 1 if anything grew")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark, and print its table and what grew.

    Raises:
        SystemExit: `--check` is set, and memory or graphs grew.
        ValueError: no epoch follows the warm-up.
    """
    rows = measure(args.model, args.steps, args.batch_size, args.backend)
    print(table(rows, FORMATS))
    grown = growth(rows)
    print("\n".join(grown) or "neither memory nor graphs grew")
    if args.check and grown:
        sys.exit(1)


def growth(rows: Sequence[EpochRow]) -> list[str]:
    """Return one sentence for each thing that grew after the warm-up.

    Args:
        rows: rows of a run, in order.

    Raises:
        ValueError: no epoch follows the warm-up.
    """
    if len(rows) <= WARMUP:
        raise ValueError(f"--steps must give more than {WARMUP} epochs, got {len(rows)}")
    before, last = rows[WARMUP - 1], rows[-1]
    grown = []
    if last.rss_mib > (1 + TOLERANCE) * before.rss_mib:
        grown.append(f"memory grew from {before.rss_mib:.1f} to {last.rss_mib:.1f} MiB")
    if last.graphs > before.graphs:
        grown.append(f"graphs grew from {before.graphs} to {last.graphs}")
    return grown


def measure(model_name: str, steps: int, batch_size: int, backend: str) -> list[EpochRow]:
    """Train for whole epochs until at least `steps` steps are done.

    Args:
        model_name: timm model.
        steps: minimum number of training steps.
        batch_size: images in a batch; the last batch of each epoch is shorter.
        backend: `"inductor"` or `"aot_eager"`.
    """
    torch.manual_seed(0)
    images, labels = _digits()
    per_epoch = -(-len(images) // batch_size)
    scheduler = SparsityScheduler(bar(0.8, period=2 * per_epoch))
    model = timm.create_model(model_name, num_classes=10).train()
    # Make every layer sparse, even if it gains no time: the question is what accumulates.
    config = SparsityConfig(min_channels=16, gate=False)
    compiled = ssprop_compile(model, scheduler, config=config, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rows: list[EpochRow] = []
    while not rows or rows[-1].steps < steps:
        rate = scheduler.drop_rate
        for batch in torch.randperm(len(images)).split(batch_size):
            functional.cross_entropy(compiled(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        compiled.eval()
        with torch.no_grad():
            compiled(images[:batch_size])
        compiled.train()
        rows.append(
            EpochRow(
                epoch=len(rows),
                steps=per_epoch * (len(rows) + 1),
                drop_rate=rate,
                rss_mib=_rss_mib(),
                graphs=counters["stats"]["unique_graphs"],
            )
        )
    return rows


def _digits() -> tuple[Tensor, Tensor]:
    """Return images [N, 3, 32, 32] in channels_last, and labels [N]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.3
    images = functional.interpolate(images, (_IMAGE, _IMAGE)).expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(digits.target)


def _rss_mib() -> float:
    fields = Path("/proc/self/status").read_text().splitlines()
    return next(int(f.split()[1]) / 1024 for f in fields if f.startswith("VmRSS"))
