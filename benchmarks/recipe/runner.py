"""Runner: trains all rows of a task in turn, step by step, so that all meet the same machine."""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.machine import allocator, environment
from benchmarks.recipe.images import Images
from benchmarks.recipe.learner import Learner
from benchmarks.recipe.rows import rows_of
from benchmarks.recipe.task import Task
from benchmarks.study.store import append_result, has_result

__all__ = ["run_task"]


def run_task(
    task: Task,
    train: Images,
    test: Images,
    results: Path,
    *,
    names: Sequence[str] | None = None,
    seeds: Sequence[int],
    weights: Path | None = None,
) -> None:
    """Run every row without a result, all of one seed together.

    Args:
        task: the task.
        train: its training images.
        test: its test images.
        results: JSONL file; each seed adds a line for each row at its end.
        names: names of the rows; all by default. The dense row runs with them: it is the clock.
        seeds: the seeds, one after another.
        weights: file with weights to start from.
    """
    allocator()
    # Every learner is one more compile of the same code.
    torch._dynamo.config.recompile_limit = 1000
    rows = rows_of(task)
    names = list(dict.fromkeys(["dense", *(names or rows)]))
    learners = {name: Learner(task, rows[name], weights) for name in names}
    for seed in seeds:
        wanted = [n for n in names if not has_result(results, task.name, n, seed)]
        if not wanted:
            continue
        running = [learners[name] for name in dict.fromkeys(["dense", *wanted])]
        began = time.perf_counter()
        for learner in running:
            learner.start(seed, train)
        print(f"{task.name} seed {seed}: ready in {time.perf_counter() - began:.0f} s", flush=True)
        curves = _train(running, test, seed)
        for name in wanted:
            learner = learners[name]
            result: dict[str, Any] = {
                "task": task.name,
                "setting": name,
                "seed": seed,
                **curves[name][-1],
                "relative": learner.seconds / learners["dense"].seconds,
                "shares": _quarters(learner.shares),
                "steps": learner.total,
                "curve": curves[name],
            }
            append_result(results, result | environment("cpu"))


def _train(
    learners: Sequence[Learner], test: Images, seed: int
) -> dict[str, list[dict[str, float]]]:
    """Train all learners to their ends; return what each test of each row found."""
    curves: dict[str, list[dict[str, float]]] = {learner.row.name: [] for learner in learners}
    while running := [learner for learner in learners if not learner.is_done]:
        for learner in running:
            learner.step()
            curve = curves[learner.row.name]
            if learner.is_done or learner.epoch >= len(curve) + 1:
                curve.append({"seconds": learner.seconds, **learner.evaluate(test)})
                at = f"{learner.row.name} seed {seed} epoch {learner.epoch:.1f}"
                print(f"{at}: {curve[-1]['accuracy']:.2f} %, {learner.seconds:.1f} s", flush=True)
    return curves


def _quarters(values: Sequence[float]) -> list[float]:
    """Return the mean of each quarter of the values."""
    cuts = [i * len(values) // 4 for i in range(5)]
    return [round(fmean(values[a:b]), 4) for a, b in itertools.pairwise(cuts)]
