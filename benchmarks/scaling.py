"""`python -m benchmarks scaling`: speed-up over drop rate, at several batch sizes and resolutions.

It measures the rows of `step` at every drop rate: each batch size at the first resolution, and each
resolution at the first batch size.
"""

import argparse

from benchmarks.configs import add_config_arguments, configs_of
from benchmarks.machine import environment
from benchmarks.results import save
from benchmarks.step import measure
from benchmarks.workload import add_workload_arguments, workload_of

__all__ = ["DROP_RATES", "add_parser"]

DROP_RATES = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "scaling",
        help="steps over drop rate, batch size and resolution",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload_arguments(parser)
    add_config_arguments(parser)
    parser.add_argument("--drop-rates", type=float, nargs="+", default=list(DROP_RATES))
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[], help="more batch sizes")
    parser.add_argument("--img-sizes", type=int, nargs="*", default=[], help="more resolutions")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each row")
    parser.add_argument("--output", help="folder for a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its tables."""
    base, configs = workload_of(args), configs_of(args)
    points = [(base.batch_size, base.img_size)]
    points += [(batch_size, base.img_size) for batch_size in args.batch_sizes]
    points += [(base.batch_size, img_size) for img_size in args.img_sizes]
    rows = []
    for batch_size, img_size in dict.fromkeys(points):
        rows += measure(base.at(batch_size, img_size), configs, args.drop_rates, args.rounds)
    if args.output:
        save(rows, environment(args.device), args.output, f"scaling-{base.slug}")
