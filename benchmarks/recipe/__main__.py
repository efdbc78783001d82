"""Command line of the recipe's study."""

import argparse
import time
from pathlib import Path

from benchmarks.machine import allocator, environment
from benchmarks.study.store import append_result, has_result

HERE = Path(__file__).parent


def main() -> None:
    """Run the command of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe", description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl", metavar="FILE")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run every row without a result, with all of a seed's")
    run.add_argument("task", metavar="TASK")
    run.add_argument("--data", type=Path, required=True, metavar="DIR", help="flowers5, cifar10")
    run.add_argument("--weights", type=Path, metavar="FILE", help="ImageNet weights")
    run.add_argument("--cache", type=Path, default=Path("runs/recipe"), metavar="DIR")
    run.add_argument("--rows", nargs="+", metavar="ROW")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N")
    run.set_defaults(command=run_task)
    args = parser.parse_args()
    args.command(args)


def run_task(args: argparse.Namespace) -> None:
    """Train all rows of a task in turn, step by step, so that all meet the same machine."""
    # These import the compiler, which takes seconds.
    import torch

    from benchmarks.recipe.learner import Learner
    from benchmarks.recipe.rows import rows_of
    from benchmarks.recipe.task import TASKS

    allocator()
    # Every learner is one more compile of the same code.
    torch._dynamo.config.recompile_limit = 1000
    task = TASKS[args.task]
    train, test = task.load(args.data, args.cache)
    rows = rows_of(task)
    learners = {name: Learner(task, rows[name], args.weights) for name in args.rows or rows}
    for seed in args.seeds:
        wanted = [n for n in learners if not has_result(args.results, task.name, n, seed)]
        if not wanted:
            continue
        # The dense run is the clock of all others.
        running = [learners[name] for name in dict.fromkeys(["dense", *wanted]) if name in learners]
        began = time.perf_counter()
        for learner in running:
            learner.start(seed, train)
        print(
            f"{task.name} seed {seed}: compiled in {time.perf_counter() - began:.0f} s", flush=True
        )
        curves = {learner.row.name: [] for learner in running}
        epochs = {learner.row.name: 1 for learner in running}
        while any(not learner.is_done for learner in running):
            for learner in running:
                if learner.is_done:
                    continue
                learner.step()
                name = learner.row.name
                if learner.is_done or learner.epoch >= epochs[name]:
                    epochs[name] += 1
                    found = learner.evaluate(test)
                    curves[name].append({"seconds": learner.seconds, **found})
                    print(name, seed, f"{learner.epoch:.1f}", curves[name][-1], flush=True)
        dense = learners["dense"]
        for name in wanted:
            learner = learners[name]
            quarters = [
                learner.shares[i * len(learner.shares) // 4 :][: len(learner.shares) // 4]
                for i in range(4)
            ]
            append_result(
                args.results,
                {
                    "task": task.name,
                    "setting": name,
                    "seed": seed,
                    **curves[name][-1],
                    "relative": learner.seconds / dense.seconds,
                    "shares": [round(sum(q) / max(len(q), 1), 4) for q in quarters],
                    "steps": learner.total,
                    "curve": curves[name],
                    **environment("cpu"),
                },
            )


if __name__ == "__main__":
    main()
