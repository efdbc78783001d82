"""The rows of a table: means over seeds, costs, and gains over dense training of equal cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.study.cost import Cost, cost, dense_accuracy
from benchmarks.study.store import Result
from benchmarks.study.task import Task

__all__ = ["Row", "spread", "summarize"]


@dataclass(frozen=True)
class Row:
    """One setting, over its seeds.

    Attributes:
        name: name of the setting.
        seeds: number of runs.
        accuracy: mean of their accuracies in percent.
        deviation: their standard deviation; None for a single run.
        cost: cost in epochs of the task's dense model.
        gain: accuracy minus the accuracy of dense training at the same arithmetic, in points; None
            for dense training itself and outside its curve.
        gain_in_time: the same with dense training for the same time.
        error: standard error of both gains; None if no setting has two runs.
    """

    name: str
    seeds: int
    accuracy: float
    deviation: float | None
    cost: Cost
    gain: float | None
    gain_in_time: float | None
    error: float | None

    @property
    def is_dense(self) -> bool:
        """Whether the row is a point of the curve that other rows are compared with."""
        return self.name.startswith("dense")


def spread(accuracies: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation over seeds, pooled over settings.

    Three seeds are too few to estimate a spread; the seeds of all settings of a task are enough.

    Args:
        accuracies: accuracies of each setting.

    Returns:
        Square root of the mean variance, weighted by degrees of freedom; None without any.
    """
    squares = [stdev(values) ** 2 * (len(values) - 1) for values in accuracies if len(values) > 1]
    degrees = sum(len(values) - 1 for values in accuracies if len(values) > 1)
    return (sum(squares) / degrees) ** 0.5 if degrees else None


def summarize(task: Task, results: Sequence[Result], per_saving: float) -> list[Row]:
    """Return the rows of a task's table, in the order of its settings.

    Args:
        task: the task.
        results: results of any tasks.
        per_saving: as in `benchmarks.study.cost.cost`.

    Returns:
        A row for each setting with a result; no rows if there is no dense run.
    """
    runs = {
        name: [r for r in results if r["task"] == task.name and r["setting"] == name]
        for name in task.settings
    }
    runs = {name: found for name, found in runs.items() if found}
    if "dense" not in runs:
        return []
    reference = runs["dense"][0]["forward_flops"]
    costs = {
        name: cost(
            found[0]["epochs"],
            fmean(r["backward_saved"] for r in found),
            found[0]["forward_flops"] / reference,
            per_saving,
        )
        for name, found in runs.items()
    }
    accuracies = {name: [r["accuracy"] for r in found] for name, found in runs.items()}
    dense = [name for name in runs if name.startswith("dense")]
    curve = [(costs[name].arithmetic, fmean(accuracies[name])) for name in dense]
    deviation = spread(list(accuracies.values()))
    # Conservative: between two dense settings the curve has a smaller error than at either.
    dense_seeds = min(len(runs[name]) for name in dense)
    rows = []
    for name, values in accuracies.items():
        at = {"arithmetic": costs[name].arithmetic, "time": costs[name].time}
        gains = {
            kind: None if name in dense or found is None else fmean(values) - found
            for kind, found in ((kind, dense_accuracy(curve, x)) for kind, x in at.items())
        }
        rows.append(
            Row(
                name=name,
                seeds=len(values),
                accuracy=fmean(values),
                deviation=stdev(values) if len(values) > 1 else None,
                cost=costs[name],
                gain=gains["arithmetic"],
                gain_in_time=gains["time"],
                error=None
                if deviation is None
                else deviation * (1 / len(values) + 1 / dense_seeds) ** 0.5,
            )
        )
    return rows
