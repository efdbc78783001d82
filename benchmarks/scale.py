"""`python -m benchmarks scale`: a model of step time over bandwidth, for data-parallel training.

Nothing of it is measured on a network. Arithmetic is the dense and the sparse step of a saved
`breakdown`, on one machine; what is sent is counted and the packing of kept rows is timed in one
process; bandwidth, latency and number of ranks are parameters (`benchmarks.scale_model` has the
formulas). Three kinds of step:

    dense   whole gradients are sent
    sparse  the sparse step, each rank's own selection: whole gradients are sent
    kept    the sparse step, one selection for all ranks: scores, then kept rows

`--check` compares the model with gloo processes on this machine: a network is fitted to single
all-reduces of the first number of ranks and predicts what the same and the other numbers take. The
tables are printed as docs/scale.md has them.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.communication import Job, measure
from benchmarks.machine import environment
from benchmarks.picture import draw_scale
from benchmarks.results import save, table
from benchmarks.scale_check import CheckRow, check
from benchmarks.scale_rows import Inputs, LimitRow, inputs_of, limits, scale
from ssprop_fx import SparsityConfig

__all__ = ["add_parser", "markdown"]

_STEPS = Path("benchmarks/results/cpu-2-cores/breakdown-resnet50-224-b16-fp32-channels_last.json")
_OVERLAPS = (0.0, 1.0)
_FORMATS = {
    "ranks": "",
    "overlap": "g",
    "gbits": "g",
    "dense_ms": ".0f",
    "sparse_ms": ".0f",
    "kept_ms": ".0f",
    "sparse_speedup": ".2f",
    "kept_speedup": ".2f",
}


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
    alone = measure(job)
    inputs = inputs_of(dense, sparse, alone)
    settings = [(ranks, args.latency_us, overlap) for ranks in args.ranks for overlap in _OVERLAPS]
    rows = [row for setting in settings for row in scale(inputs, *setting, args.gbits)]
    bounds = [limits(inputs, *setting) for setting in settings]
    checks = []
    if args.check:
        checks = check({ranks: measure(job, ranks, alone.what) for ranks in args.check}, alone)
    print(table(rows, _FORMATS))
    print(f"\n{markdown(inputs, bounds, checks)}")
    if args.output:
        parts = {"inputs": [inputs], "limits": bounds, "check": checks}
        for name, part in parts.items():
            if part:
                save(part, environment("cpu"), args.output, f"scale-{job.model}-{name}")
        picture = save(rows, environment("cpu"), args.output, f"scale-{job.model}")
        draw_scale([asdict(row) for row in rows], picture)


def markdown(inputs: Inputs, bounds: Sequence[LimitRow], checks: Sequence[CheckRow]) -> str:
    """Return the tables of docs/scale.md."""
    lines = ["| input | |", "|---|---|"]
    lines += [
        f"| dense step: forward, backward | {inputs.dense_forward_ms:.0f} ms,"
        f" {inputs.dense_backward_ms:.0f} ms |",
        f"| sparse step: forward, backward | {inputs.sparse_forward_ms:.0f} ms,"
        f" {inputs.sparse_backward_ms:.0f} ms |",
        f"| gradients | {inputs.gradient_bytes / 1e6:.1f} MB in {inputs.buckets} buckets |",
        f"| kept rows | {inputs.kept_bytes / 1e6:.1f} MB in {inputs.buckets} buckets, and"
        f" {inputs.row_bytes / 1e3:.0f} kB to agree on rows: a share of {inputs.kept_share:.2f} |",
        f"| gathering and scattering kept rows | {inputs.packing_ms:.0f} ms |",
        f"| scores | {inputs.score_bytes / 1e3:.0f} kB in {inputs.layers} all-reduces |",
        "",
        "| ranks | hidden behind the backward | sparse gains less than 10 % below | kept rows are"
        " faster than whole gradients below | kept rows are faster than dense |"
        " communication takes less than 5 % above | kept rows gain nothing from a latency of |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.ranks} | {'all of it' if row.overlap else 'nothing'} | {row.little_below:.2g} |"
        f" {row.kept_below:.2g} |"
        f" {'always' if math.isinf(row.wins_below) else f'below {row.wins_below:.2g}'} |"
        f" {row.free_above:.2g} | {row.latency_limit_us:.0f} µs |"
        for row in bounds
    ]
    if checks:
        lines += [
            "",
            "| processes | sent | bytes | all-reduces | measured ms | model ms | ratio |",
            "|---|---|---|---|---|---|---|",
        ]
    lines += [
        f"| {row.ranks} | {row.what} | {row.bytes} | {row.messages} | {row.measured_ms:.3g} |"
        f" {row.model_ms:.3g} | {row.ratio:.2f} |"
        for row in checks
    ]
    return "\n".join(lines)
