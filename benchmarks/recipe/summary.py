"""Summaries: the runs of each row, and how it compares with dense training of equal time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.recipe.rows import rows_of
from benchmarks.recipe.task import Task
from benchmarks.study.cost import dense_accuracy
from benchmarks.study.store import Result

__all__ = ["Gain", "Summary", "summarize"]


@dataclass(frozen=True)
class Gain:
    """The mean of paired differences, in points of accuracy.

    Attributes:
        mean: their mean.
        error: its standard error; None for one pair.
    """

    mean: float
    error: float | None

    @property
    def is_sure(self) -> bool:
        """Whether it is beyond two standard errors."""
        return self.error is not None and abs(self.mean) > 2 * self.error

    def __str__(self) -> str:
        text = f"{self.mean:+.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")
        return f"**{text}**" if self.is_sure else text


@dataclass(frozen=True)
class Summary:
    """The runs of one row of a table.

    Attributes:
        name: name of the row.
        about: what differs from the dense run.
        seeds: number of runs.
        accuracy: mean accuracy in percent.
        loss: mean test loss.
        ece: mean calibration error in percent.
        seconds: mean processor time of a run, without compiling.
        time: mean processor time as a share of the whole dense run's, of the same seed.
        shares: share of each batch that backwards kept, in each quarter of the run.
        to_full: gain over the whole dense run.
        to_equal: gain over dense training of equal time, or over the dense row that is nearest in
            time; None for dense rows.
    """

    name: str
    about: str
    seeds: int
    accuracy: float
    loss: float
    ece: float
    seconds: float
    time: float
    shares: tuple[float, ...]
    to_full: Gain | None
    to_equal: Gain | None


def summarize(task: Task, results: Sequence[Result]) -> list[Summary]:
    """Return a summary of each row of a task that has results."""
    rows = rows_of(task)
    by_row = {
        name: {r["seed"]: r for r in results if (r["task"], r["setting"]) == (task.name, name)}
        for name in rows
    }
    dense = {name: by_row[name] for name, row in rows.items() if row.is_dense}
    made = []
    for name, runs in by_row.items():
        if not runs:
            continue
        of_runs = list(runs.values())
        equal = None if rows[name].is_dense else _gain(runs, lambda s, r: _equal(dense, s, r))
        made.append(
            Summary(
                name=name,
                about=rows[name].about,
                seeds=len(runs),
                accuracy=fmean(r["accuracy"] for r in of_runs),
                loss=fmean(r["loss"] for r in of_runs),
                ece=fmean(r["ece"] for r in of_runs),
                seconds=fmean(r["seconds"] for r in of_runs),
                time=fmean(r["relative"] for r in of_runs),
                shares=tuple(map(fmean, zip(*(r["shares"] for r in of_runs), strict=True))),
                to_full=None if name == "dense" else _gain(runs, lambda s, r: _full(dense, s)),
                to_equal=equal,
            )
        )
    return made


def _gain(runs: Mapping[int, Result], other: Callable[[int, Result], float | None]) -> Gain | None:
    """Return the mean difference to what `other` returns for the same seed."""
    pairs = [(r["accuracy"], other(seed, r)) for seed, r in runs.items()]
    gains = [accuracy - found for accuracy, found in pairs if found is not None]
    if not gains:
        return None
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    return Gain(fmean(gains), error)


def _full(dense: Mapping[str, Mapping[int, Result]], seed: int) -> float | None:
    return dense["dense"][seed]["accuracy"] if seed in dense["dense"] else None


def _equal(dense: Mapping[str, Mapping[int, Result]], seed: int, run: Result) -> float | None:
    """Return the accuracy of dense training of the same seed and of this run's time.

    A run that is shorter than all dense ones is compared with the shortest, which takes longer; one
    that takes longer than all of them, with the longest.
    """
    curve = [
        (runs[seed]["relative"], runs[seed]["accuracy"]) for runs in dense.values() if seed in runs
    ]
    if not curve:
        return None
    return dense_accuracy(curve, min(max(run["relative"], min(curve)[0]), max(curve)[0]))
