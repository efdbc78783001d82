"""`python -m benchmarks gpu-study`: does a sparse backward learn more in the same time on a GPU?

CIFAR-10 lies in the memory of the GPU and is augmented there. Each stage trains all rows with one
seed: dense for 20, 15, 12 and 10 epochs, and 20 epochs with each rule that leaves samples out. So a
run that is cut off leaves whole seeds.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.gpu.command import add_arguments, run_stages
from benchmarks.gpu.runner import DONE
from benchmarks.gpu.study import SEEDS, summary_table

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "gpu-study",
        help="what sparse training buys on a GPU",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument("--data", type=Path, help="CIFAR-10, as `gpu-pack` writes it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the seeds and print the summary; exit with status 1 if a seed is not done.

    Raises:
        ValueError: there is no data.
    """
    if not args.tiny and args.data is None:
        raise ValueError("--data must be a file that `python -m benchmarks gpu-pack` wrote")
    more = [] if args.data is None else ["--data", str(args.data)]
    outcomes = run_stages(args, SEEDS, more)
    print(f"\n{summary_table(args.resume or args.output)}")
    sys.exit(0 if all(outcome.state == DONE for outcome in outcomes) else 1)
