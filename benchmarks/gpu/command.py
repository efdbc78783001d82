"""`python -m benchmarks gpu`: a GPU's figures in ten minutes, the most telling first.

Each stage is a process with its own share of the time. It saves its rows as it goes, so whatever is
cut off is still a result. `--resume FOLDER` goes on with what is not done. `--device cpu --tiny`
rehearses all stages in minutes, without a GPU.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import ahead
from benchmarks.gpu.runner import DONE, Job, Outcome, run_jobs
from benchmarks.gpu.settings import Stage
from benchmarks.gpu.stages import STAGES

__all__ = ["add_arguments", "add_parser", "run_stages"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "gpu",
        help="a GPU's figures in ten minutes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="stages to run")
    parser.set_defaults(run=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `run_stages` reads."""
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("--output", type=Path, help="new folder for the results")
    folder.add_argument("--resume", type=Path, help="folder of a run to go on with")
    parser.add_argument("--minutes", type=float, default=10, help="time for all stages")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with small models")


def run(args: argparse.Namespace) -> None:
    """Run the stages; exit with status 1 if one is not done."""
    stages = [stage for stage in STAGES if stage.name in args.only]
    sys.exit(0 if all(o.state == DONE for o in run_stages(args, stages)) else 1)


def run_stages(
    args: argparse.Namespace, stages: Sequence[Stage], more: Sequence[str] = ()
) -> list[Outcome]:
    """Run stages within the time.

    Args:
        args: arguments of `add_arguments`.
        stages: the stages.
        more: further arguments of `python -m benchmarks.gpu`.

    Returns:
        What became of each.

    Raises:
        ValueError: `--output` has results already, or `--resume` has none.
    """
    # So that no process is left when this one is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = args.resume or args.output
    has_results = any(folder.glob("gpu-*.json"))
    if args.output and has_results:
        raise ValueError(f"--output {folder} has results: go on with --resume {folder}")
    if args.resume and not has_results:
        raise ValueError(f"--resume {folder} has no results: begin with --output {folder}")
    shared = ["--device", args.device, "--output", str(folder), *["--tiny"] * args.tiny, *more]
    jobs = [
        Job(
            stage.name,
            stage.seconds,
            (sys.executable, "-m", "benchmarks.gpu", stage.name, *shared),
        )
        for stage in stages
    ]
    beside = [] if args.tiny else ahead.command(stages, args.device)
    return run_jobs(jobs, 60 * args.minutes, folder, beside)
