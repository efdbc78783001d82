"""Command line of the study."""

import argparse
import fnmatch
import time
from pathlib import Path

from benchmarks.study.grid import GRIDS, settings
from benchmarks.study.page import page
from benchmarks.study.store import has_result, read_results

HERE = Path(__file__).parent
_START_SEED = 1


def main() -> None:
    """Run the command of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--grid", choices=list(GRIDS), default="small")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run every setting without a result")
    run.add_argument("--data", type=Path, metavar="ZIP", help="CIFAR-10, as data.py reads it")
    run.add_argument("--work", type=Path, default=Path("runs/study"), metavar="DIR")
    run.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="TASK/SETTING")
    run.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    run.add_argument("--minutes", type=float, metavar="N", help="start no run after N minutes")
    run.set_defaults(command=run_grid)
    table = commands.add_parser("table", help="print the page docs/study-channels.md")
    table.set_defaults(command=print_page)
    plot = commands.add_parser("plot", help="plot accuracy over time")
    plot.add_argument("path", type=Path, metavar="PNG")
    plot.set_defaults(command=plot_grid)
    args = parser.parse_args()
    args.command(args)


def run_grid(args: argparse.Namespace) -> None:
    """Run every setting without a result: all settings with one seed, then with the next."""
    # Import here: this imports the compiler, which takes seconds.
    from benchmarks.study.runner import Places, run_one

    places = Places(_results(args), args.work, args.data)
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for seed in args.seeds:
        for setting in settings(args.grid):
            if not any(fnmatch.fnmatch(setting.key, pattern) for pattern in args.only):
                continue
            # All seeds of a task start from the same weights.
            if setting.is_start and seed != _START_SEED:
                continue
            if has_result(places.results, setting.task.name, setting.name, seed):
                continue
            if end is not None and time.monotonic() > end:
                return
            result = run_one(setting, seed, places)
            print(f"{setting.key} seed {seed}: {result['accuracy']:.2f} %", flush=True)


def print_page(args: argparse.Namespace) -> None:
    """Print the page of the existing results."""
    print(page(GRIDS[args.grid], read_results(_results(args))), end="")


def plot_grid(args: argparse.Namespace) -> None:
    """Plot the existing results."""
    # matplotlib is optional.
    from benchmarks.study.plot import draw

    draw(GRIDS[args.grid], read_results(_results(args)), args.path)


def _results(args: argparse.Namespace) -> Path:
    path: Path = args.results / f"{args.grid}.jsonl"
    return path


if __name__ == "__main__":
    main()
