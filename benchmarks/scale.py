"""`python -m benchmarks scale`: a model of step time over bandwidth, for data-parallel training.

Nothing of it is measured on a network. Arithmetic is the dense and the sparse step of a saved
`breakdown`, on one machine; what is sent is counted and the packing of kept rows is timed in one
process; bandwidth, latency and number of ranks are parameters (`benchmarks.scale_model` has the
formulas). Three kinds of step:

    dense   whole gradients are sent
    sparse  the sparse step, each rank's own selection: whole gradients are sent
    kept    the sparse step, one selection for all ranks: scores, then kept rows

`--check` compares the model with gloo processes on this machine: a network is fitted to single
all-reduces of the first number of ranks and predicts what the same and the other numbers take.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.communication import Communication, Job, measure
from benchmarks.machine import environment
from benchmarks.picture import draw_scale
from benchmarks.results import save, table
from benchmarks.scale_model import Network, Part, Step, faster_below_gbits
from ssprop_fx import SparsityConfig

__all__ = ["CheckRow", "Inputs", "LimitRow", "ScaleRow", "add_parser", "fit", "limits", "steps"]

_STEPS = Path("benchmarks/results/cpu-2-cores/breakdown-resnet50-224-b16-fp32-channels_last.json")
_OVERLAPS = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the model is fed.

    Attributes:
        model: name, resolution, batch, precision, layout.
        drop_rate: of the sparse step.
        dense_forward_ms, dense_backward_ms, sparse_forward_ms, sparse_backward_ms: arithmetic.
        packing_ms: gathering and scattering kept rows.
        gradient_bytes, buckets: what a plain step sends.
        kept_bytes, row_bytes: what kept rows send, and agreeing on them.
        score_bytes, layers: what the shared selection sends.
        kept_share: all that kept rows send, by `gradient_bytes`.
    """

    model: str
    drop_rate: float
    dense_forward_ms: float
    dense_backward_ms: float
    sparse_forward_ms: float
    sparse_backward_ms: float
    packing_ms: float
    gradient_bytes: int
    buckets: int
    kept_bytes: int
    row_bytes: int
    score_bytes: int
    layers: int
    kept_share: float


@dataclass(frozen=True, kw_only=True)
class ScaleRow:
    """Step times at one bandwidth, milliseconds, and speed-ups over the dense step there."""

    ranks: int
    latency_us: float
    overlap: float
    gbits: float
    dense_ms: float
    sparse_ms: float
    kept_ms: float
    sparse_speedup: float
    kept_speedup: float


@dataclass(frozen=True, kw_only=True)
class LimitRow:
    """Bandwidths, gigabits per second, at which something changes.

    Attributes:
        ranks, latency_us, overlap: as in `ScaleRow`.
        little_below: below it the sparse step that sends whole gradients gains less than 10 %.
        kept_below: below it kept rows are faster than whole gradients, sparse both times.
        wins_below: below it kept rows are faster than dense; infinite where they always are.
        free_above: above it communication takes less than 5 % of the dense step's arithmetic.
        latency_limit_us: latency at which kept rows are no faster than dense, however large the
            bandwidth.
    """

    ranks: int
    latency_us: float
    overlap: float
    little_below: float
    kept_below: float
    wins_below: float
    free_above: float
    latency_limit_us: float


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """A measured time of communication and the model's.

    Attributes:
        ranks: processes.
        what: is sent.
        bytes, messages: of it.
        measured_ms: median.
        model_ms: by the network fitted to the first number of ranks.
        ratio: measured by model.
    """

    ranks: int
    what: str
    bytes: int
    messages: int
    measured_ms: float
    model_ms: float
    ratio: float


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "scale",
        help="a model of step time over ranks and bandwidth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=Path, default=_STEPS, help="JSON file of `breakdown`")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument(
        "--gbits", type=float, nargs="+", default=[0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
    )
    parser.add_argument("--latency-us", type=float, default=20.0, help="of a message")
    parser.add_argument("--img-size", type=int, default=64, help="of the step that is counted")
    parser.add_argument("--batch-size", type=int, default=4, help="of the step that is counted")
    parser.add_argument("--min-channels", type=int, default=SparsityConfig.min_channels)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps")
    parser.add_argument("--check", type=int, nargs="*", default=[], help="processes, as in 2 4")
    parser.add_argument("--output", help="folder for CSV and JSON files and a picture of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its tables."""
    dense, sparse = json.loads(args.steps.read_text())["rows"]
    job = Job(
        model=dense["model"].split()[0],
        drop_rate=sparse["drop_rate"],
        img_size=args.img_size,
        batch_size=args.batch_size,
        rounds=args.rounds,
        min_channels=args.min_channels,
    )
    alone = measure(job, ranks=1)
    inputs = _inputs(dense, sparse, alone)
    rows, bounds = [], []
    for ranks in args.ranks:
        for overlap in _OVERLAPS:
            rows += scale(inputs, ranks, args.latency_us, overlap, args.gbits)
            bounds.append(limits(inputs, ranks, args.latency_us, overlap))
    tables = {"inputs": [inputs], "": rows, "limits": bounds}
    if args.check:
        tables["check"] = check({ranks: measure(job, ranks) for ranks in args.check}, alone)
    for name, shown in tables.items():
        if name == "inputs":
            print("\n".join(f"{field}: {value}" for field, value in asdict(inputs).items()))
        else:
            print(f"\n{table(shown, _formats(shown[0]))}")
        if args.output:
            title = "-".join(["scale", job.model, *[name] * bool(name)])
            picture = save(shown, environment("cpu"), args.output, title)
            if not name:
                draw_scale([asdict(row) for row in rows], picture)


def steps(inputs: Inputs) -> dict[str, Step]:
    """Return the three kinds of step."""
    gradients = Part(inputs.gradient_bytes, inputs.buckets)
    sparse = (inputs.sparse_forward_ms, inputs.sparse_backward_ms)
    return {
        "dense": Step(inputs.dense_forward_ms, inputs.dense_backward_ms, gradients),
        "sparse": Step(*sparse, gradients),
        "kept": Step(
            *sparse,
            Part(inputs.kept_bytes, inputs.buckets),
            serial=(
                Part(inputs.score_bytes, inputs.layers),
                Part(inputs.row_bytes, inputs.buckets),
            ),
            packing_ms=inputs.packing_ms,
        ),
    }


def scale(
    inputs: Inputs, ranks: int, latency_us: float, overlap: float, gbits: Sequence[float]
) -> list[ScaleRow]:
    """Return the rows of some bandwidths."""
    rows = []
    for bandwidth in gbits:
        network = Network(ranks, bandwidth, latency_us)
        ms = {name: step.ms(network, overlap) for name, step in steps(inputs).items()}
        rows.append(
            ScaleRow(
                ranks=ranks,
                latency_us=latency_us,
                overlap=overlap,
                gbits=bandwidth,
                dense_ms=ms["dense"],
                sparse_ms=ms["sparse"],
                kept_ms=ms["kept"],
                sparse_speedup=ms["dense"] / ms["sparse"],
                kept_speedup=ms["dense"] / ms["kept"],
            )
        )
    return rows


def limits(inputs: Inputs, ranks: int, latency_us: float, overlap: float) -> LimitRow:
    """Return the bandwidths at which something changes."""
    made = steps(inputs)

    def ms(name: str, gbits: float) -> float:
        return made[name].ms(Network(ranks, gbits, latency_us), overlap)

    dense, kept = made["dense"], made["kept"]
    messages = sum(part.messages for part in kept.serial)
    if not overlap:
        messages += kept.overlapping.messages - dense.overlapping.messages
    saved_us = (dense.compute_ms - kept.compute_ms) * 1e3
    return LimitRow(
        ranks=ranks,
        latency_us=latency_us,
        overlap=overlap,
        little_below=faster_below_gbits(lambda g: ms("dense", g) < 1.1 * ms("sparse", g)),
        kept_below=faster_below_gbits(lambda g: ms("kept", g) < ms("sparse", g)),
        wins_below=faster_below_gbits(lambda g: ms("kept", g) < ms("dense", g)),
        free_above=faster_below_gbits(lambda g: ms("dense", g) > 1.05 * dense.compute_ms),
        latency_limit_us=saved_us / (2 * (ranks - 1) * messages) if messages else math.inf,
    )


def fit(found: Communication, ranks: int) -> Network:
    """Return the network that single all-reduces of this many ranks fit best, by ratios."""
    sizes, times = np.array(list(found.sizes_ms.items())).T
    slope, ms = np.polyfit(sizes, times, 1, w=1 / times)
    messages = 2 * (ranks - 1)
    return Network(ranks, messages / ranks * 8 / (slope * 1e6), ms * 1e3 / messages)


def check(found: dict[int, Communication], alone: Communication) -> list[CheckRow]:
    """Compare measured times with the model's.

    Args:
        found: by number of ranks; the network is fitted to the first.
        alone: of one rank, for the time that packing takes.
    """
    first = next(iter(found))
    fitted = fit(found[first], first)
    rows = []
    for ranks, measured in found.items():
        own = fit(measured, ranks)
        print(f"{ranks} ranks: {own.gbits:.2f} Gbit/s and {own.latency_us:.0f} us fit best")
        network = Network(ranks, fitted.gbits, fitted.latency_us)
        sent: dict[str, tuple[list[Part], float, float]] = {
            f"all-reduce of {size} bytes": ([Part(size, 1)], ms, 0.0)
            for size, ms in measured.sizes_ms.items()
        }
        sent["gradients"] = [measured.gradients], measured.gradients_ms, 0.0
        packing = alone.kept_ms - alone.gradients_ms
        sent["kept rows"] = [measured.rows, measured.kept], measured.kept_ms, packing
        sent["scores"] = [measured.scores], measured.scores_ms, 0.0
        for what, (parts, ms, other_ms) in sent.items():
            model_ms = other_ms + sum(map(network.all_reduce_ms, parts))
            rows.append(
                CheckRow(
                    ranks=ranks,
                    what=what,
                    bytes=sum(part.size for part in parts),
                    messages=sum(part.messages for part in parts),
                    measured_ms=ms,
                    model_ms=model_ms,
                    ratio=ms / model_ms,
                )
            )
    return rows


def _inputs(dense: dict, sparse: dict, alone: Communication) -> Inputs:
    return Inputs(
        model=dense["model"],
        drop_rate=sparse["drop_rate"],
        dense_forward_ms=dense["forward_ms"],
        dense_backward_ms=dense["step_ms"] - dense["forward_ms"],
        sparse_forward_ms=sparse["forward_ms"],
        sparse_backward_ms=sparse["step_ms"] - sparse["forward_ms"],
        packing_ms=alone.kept_ms - alone.gradients_ms,
        gradient_bytes=alone.gradients.size,
        buckets=alone.gradients.messages,
        kept_bytes=alone.kept.size,
        row_bytes=alone.rows.size,
        score_bytes=alone.scores.size,
        layers=alone.scores.messages,
        kept_share=(alone.kept.size + alone.rows.size) / alone.gradients.size,
    )


def _formats(row: object) -> dict[str, str]:
    return {name: ".4g" * isinstance(value, float) for name, value in asdict(row).items()}
