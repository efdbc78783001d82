"""Command line of the recipe's study."""

import argparse
from pathlib import Path

from benchmarks.study.store import read_results

HERE = Path(__file__).parent


def main() -> None:
    """Run the command of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", metavar="FILE")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("run", help="run every row without a result, with all of a seed's")
    train.add_argument("task", metavar="TASK")
    train.add_argument("--data", type=Path, required=True, metavar="DIR", help="flowers5, cifar10")
    train.add_argument("--weights", type=Path, metavar="FILE", help="ImageNet weights")
    train.add_argument("--cache", type=Path, default=Path("runs/recipe"), metavar="DIR")
    train.add_argument("--rows", nargs="+", metavar="ROW")
    train.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N")
    train.set_defaults(command=run)
    table = commands.add_parser("page", help="print the page docs/study.md")
    table.set_defaults(command=print_page)
    claims = commands.add_parser("claims", help="print the figures of the README")
    claims.set_defaults(command=print_claims)
    plot = commands.add_parser("plot", help="plot accuracy over seconds")
    plot.add_argument("path", type=Path, metavar="PNG")
    plot.add_argument("--tasks", nargs="+", default=["flowers", "scratch"], metavar="TASK")
    plot.add_argument("--rule", default="noise-0.1", metavar="ROW")
    plot.set_defaults(command=plot_tasks)
    args = parser.parse_args()
    args.command(args)


def run(args: argparse.Namespace) -> None:
    """Run a task."""
    # These import the compiler, which takes seconds.
    from benchmarks.recipe.runner import run_task
    from benchmarks.recipe.task import TASKS

    task = TASKS[args.task]
    train, test = task.load(args.data, args.cache)
    run_task(
        task,
        train,
        test,
        args.results,
        names=args.rows,
        seeds=args.seeds,
        weights=args.weights,
    )


def print_page(args: argparse.Namespace) -> None:
    """Print the page of the existing results."""
    from benchmarks.recipe.page import page

    print(page(read_results(args.results)), end="")


def print_claims(args: argparse.Namespace) -> None:
    """Print what the README says."""
    from benchmarks.recipe.page import claims

    print("\n".join(claims(read_results(args.results))))


def plot_tasks(args: argparse.Namespace) -> None:
    """Plot the existing results."""
    # matplotlib is optional.
    from benchmarks.recipe.plot import draw

    draw(read_results(args.results), args.tasks, args.rule, args.path)


if __name__ == "__main__":
    main()
