"""`python -m benchmarks long`: whether a long run stays as fast and as small as it began.

Trains a small model on scikit-learn's digits with SGD: dense and sparse epochs in turn, a short
last batch in each, an evaluation after each. One row an epoch: median time of a full batch's step,
memory of the process, and the graphs that Dynamo has compiled so far. After the first two cycles of
the schedule, in which everything is compiled and pools of memory fill, the slopes of all three
should be zero within their error, and that of the ratio of sparse to dense epochs that follow one
another, in which a drift of the machine cancels. `--saved FILE` gives slopes and picture of a run
that was saved.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional

from benchmarks.machine import environment
from benchmarks.picture import draw_long_run
from benchmarks.results import save, table
from ssprop_fx import SparsityConfig, SparsityScheduler, bar, ssprop_compile

__all__ = ["EpochRow", "Slope", "add_parser", "markdown", "measure", "slope", "slopes"]

FORMATS = {
    "epoch": "",
    "steps": "",
    "drop_rate": ".2f",
    "step_ms": ".2f",
    "rss_mib": ".1f",
    "graphs": "",
}
WARMUP = 4
_IMAGE = 32


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch.

    Attributes:
        epoch: from 0.
        steps: training steps so far, this epoch included.
        drop_rate: of the epoch.
        step_ms: median time of a full batch's training step, milliseconds.
        rss_mib: resident memory of the process at its end, MiB.
        graphs: graphs that Dynamo has captured in the process so far.
    """

    epoch: int
    steps: int
    drop_rate: float
    step_ms: float
    rss_mib: float
    graphs: int


@dataclass(frozen=True)
class Slope:
    """A straight line's slope by least squares.

    Attributes:
        name: of the quantity.
        per_1000: change in 1000 steps, in its unit.
        error: standard error of that.
        first, last: ends of the line, (steps, value).
    """

    name: str
    per_1000: float
    error: float
    first: tuple[float, float]
    last: tuple[float, float]

    @property
    def is_flat(self) -> bool:
        """Whether it is zero within twice its standard error, or falls."""
        return self.per_1000 <= 2 * self.error

    def __str__(self) -> str:
        return f"{self.name}: {self.per_1000:+.4f} ± {self.error:.4f} in 1000 steps"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "long",
        help="step time and memory over thousands of steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="test_resnet", help="timm model (default: test_resnet)")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--output", help="folder for a CSV, a JSON file and a picture of the rows")
    parser.add_argument("--saved", type=Path, help="run nothing: this JSON file's slopes, picture")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a slope rises")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark, print its table and the slopes.

    Raises:
        SystemExit: `--check` found memory, graphs or the ratio of sparse to dense steps rising.
    """
    if args.saved:
        rows = [EpochRow(**row) for row in json.loads(args.saved.read_text())["rows"]]
        picture = args.saved.with_suffix(".png")
    else:
        rows = measure(args.model, args.steps, args.batch_size, args.backend)
        print(table(rows, FORMATS))
        print("; ".join(f"{key}: {value}" for key, value in environment("cpu").items()))
        if args.output:
            picture = save(rows, environment("cpu"), args.output, f"long-{args.model}")
    found = slopes(rows)
    print(markdown(found))
    if args.saved or args.output:
        draw_long_run([asdict(row) for row in rows], found, picture)
    # The times of each kind of step are those of the machine as well.
    rising = [str(line) for line in found[2:] if not line.is_flat]
    if args.check and rising:
        sys.exit("; ".join(rising))


def measure(model_name: str, steps: int, batch_size: int, backend: str) -> list[EpochRow]:
    """Train for whole epochs until so many steps are done.

    Args:
        model_name: timm model.
        steps: training steps, at least.
        batch_size: images in a batch; the last of each epoch is shorter.
        backend: `"inductor"` or `"aot_eager"`.
    """
    torch.manual_seed(0)
    images, labels = _digits()
    per_epoch = -(-len(images) // batch_size)
    scheduler = SparsityScheduler(bar(0.8, period=2 * per_epoch))
    model = timm.create_model(model_name, num_classes=10).train()
    # Every layer, whatever it gains: the question is what accumulates.
    config = SparsityConfig(min_channels=16, gate=False)
    compiled = ssprop_compile(model, scheduler, config=config, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rows: list[EpochRow] = []
    while not rows or rows[-1].steps < steps:
        rate, times = scheduler.drop_rate, []
        for batch in torch.randperm(len(images)).split(batch_size):
            start = time.perf_counter()
            loss = functional.cross_entropy(compiled(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if len(batch) == batch_size:
                times.append((time.perf_counter() - start) * 1e3)
        compiled.eval()
        with torch.no_grad():
            compiled(images[:batch_size])
        compiled.train()
        rows.append(
            EpochRow(
                epoch=len(rows),
                steps=per_epoch * (len(rows) + 1),
                drop_rate=rate,
                step_ms=statistics.median(times),
                rss_mib=_rss_mib(),
                graphs=counters["stats"]["unique_graphs"],
            )
        )
    return rows


def slopes(rows: Sequence[EpochRow]) -> list[Slope]:
    """Return the slopes of step time, dense and sparse apart, of their ratio, memory and graphs.

    Args:
        rows: of a run; the first `WARMUP` epochs are left out.
    """
    late = rows[WARMUP:]
    dense, sparse = ([r for r in late if bool(r.drop_rate) == is_sparse] for is_sparse in (0, 1))
    pairs = list(zip(sparse, dense, strict=False))
    return [
        slope("dense step, ms", [r.steps for r in dense], [r.step_ms for r in dense]),
        slope("sparse step, ms", [r.steps for r in sparse], [r.step_ms for r in sparse]),
        slope(
            "sparse / dense", [r.steps for r, _ in pairs], [s.step_ms / d.step_ms for s, d in pairs]
        ),
        slope("memory, MiB", [r.steps for r in late], [r.rss_mib for r in late]),
        slope("graphs", [r.steps for r in late], [float(r.graphs) for r in late]),
    ]


def markdown(found: Sequence[Slope]) -> str:
    """Return slopes as a Markdown table."""
    lines = [
        "| | change in 1000 steps | zero within twice its error, or falling |",
        "|---|---|---|",
    ]
    lines += [
        f"| {s.name} | {s.per_1000:+.4f} ± {s.error:.4f} | {'yes' if s.is_flat else 'no'} |"
        for s in found
    ]
    return "\n".join(lines)


def slope(name: str, steps: Sequence[int], values: Sequence[float]) -> Slope:
    """Fit a straight line.

    The standard error allows for residuals that resemble the one before them, as those of a machine
    do that is busy for a while: n values of autocorrelation r count as n (1 - r) / (1 + r)
    (Santer et al., Statistical significance of trends and trend differences in layer-average
    atmospheric temperature time series, 2000).

    Args:
        name: of the quantity.
        steps: where it was measured, three or more.
        values: what was measured.

    Example:
        >>> slope("memory, MiB", [0, 1000, 2000], [5.0, 6.0, 7.0]).per_1000
        1.0
    """
    x, y = np.asarray(steps) / 1000, np.asarray(values)
    fit = np.polyfit(x, y, 1)
    residuals = y - np.polyval(fit, x)
    squares = float(residuals @ residuals)
    # Of a constant, rounding is all that is left.
    is_exact = squares <= len(y) * (1e-12 * float(np.abs(y).max())) ** 2
    alike = 0.0 if is_exact else max(float(residuals[1:] @ residuals[:-1]) / squares, 0.0)
    freedom = max(len(y) * (1 - alike) / (1 + alike) - 2, 1.0)
    variance = 0.0 if is_exact else squares / freedom / float(((x - x.mean()) ** 2).sum())
    first, last = ((1000 * float(at), float(np.polyval(fit, at))) for at in (x[0], x[-1]))
    # Rounding of zero is neither rise nor fall.
    return Slope(name, round(float(fit[0]), 9) + 0.0, float(np.sqrt(variance)), first, last)


def _digits() -> tuple[Tensor, Tensor]:
    """Return images, [N, 3, 32, 32], channels last, and labels, [N]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.3
    images = functional.interpolate(images, (_IMAGE, _IMAGE)).expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(digits.target)


def _rss_mib() -> float:
    fields = Path("/proc/self/status").read_text().splitlines()
    return next(int(f.split()[1]) / 1024 for f in fields if f.startswith("VmRSS"))
