"""Comparison of finished runs: accuracy, time, energy and saved FLOPs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ssprop_fx.training.config_file import CONFIG
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.records.rows import EPOCHS, STEPS, EpochRow, StepRow, read_rows

__all__ = ["Comparison", "Difference", "RunData", "compare_runs", "read_run"]

_COUNTERS = ("gpu", "cpu")
# These settings do not change what a run computes.
_NO_DIFFERENCE = {"plot", "tensorboard", "energy", "workers", "checkpoint_every", "data_dir"}


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The contents of a run's folder.

    Attributes:
        name: name of the folder.
        config: settings of the run, as in its `config.yaml`.
        steps: its steps.
        epochs: its epochs; at least one.
    """

    name: str
    config: dict[str, Any]
    steps: list[StepRow]
    epochs: list[EpochRow]

    @property
    def seconds(self) -> list[float]:
        """Seconds of training up to the end of each epoch, without validation."""
        return list(accumulate(row.seconds for row in self.epochs))

    @property
    def top1(self) -> list[float]:
        """Validation accuracy of each epoch in percent."""
        return [row.eval_top1 for row in self.epochs]

    @property
    def drop_rate(self) -> float:
        """Mean drop rate of the steps."""
        return fmean(row.drop_rate for row in self.steps)

    @property
    def backward_saved(self) -> float:
        """Mean fraction of the dense backward's FLOPs that the steps left out."""
        return fmean(row.backward_saved for row in self.steps)

    def joules(self, counters: Sequence[str]) -> list[float]:
        """Return the joules up to the end of each epoch, NaN without a counter.

        Args:
            counters: the counters to sum: "gpu", "cpu" or both.
        """
        return list(
            accumulate(
                sum(getattr(row, f"{name}_joules") for name in counters) if counters else math.nan
                for row in self.epochs
            )
        )

    def seconds_to(self, top1: float) -> float:
        """Return the seconds to the end of the first epoch with that accuracy, or NaN."""
        pairs = zip(self.seconds, self.top1, strict=True)
        return next((seconds for seconds, reached in pairs if reached >= top1), math.nan)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a run differs from the baseline.

    Attributes:
        target: the highest accuracy that both reached, in percent.
        seconds_to_target: seconds that the run took to reach it.
        baseline_seconds_to_target: seconds that the baseline took to reach it.
        points: accuracy at the end minus the baseline's, in percentage points.
        seconds_saved: fraction of the baseline's seconds that the run saved, over the whole run.
        joules_saved: the same for joules; NaN if not both were measured.
        backward_saved: fraction of the dense backward's FLOPs that the run left out.
    """

    target: float
    seconds_to_target: float
    baseline_seconds_to_target: float
    points: float
    seconds_saved: float
    joules_saved: float
    backward_saved: float

    @property
    def time_ratio(self) -> float:
        """Time to the same accuracy, as a multiple of the baseline's."""
        return self.seconds_to_target / self.baseline_seconds_to_target


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs compared with one of them, the baseline.

    Attributes:
        runs: all runs.
        baseline: one of them.
        counters: the energy counters that all runs have: "gpu", "cpu", both or none.
    """

    runs: list[RunData]
    baseline: RunData
    counters: tuple[str, ...]

    def difference(self, run: RunData) -> Difference:
        """Return how a run differs from the baseline."""
        base = self.baseline
        # Not the baseline's last accuracy: a run that stops earlier may never reach it.
        target = min(max(run.top1), max(base.top1))
        return Difference(
            target=target,
            seconds_to_target=run.seconds_to(target),
            baseline_seconds_to_target=base.seconds_to(target),
            points=run.top1[-1] - base.top1[-1],
            seconds_saved=1 - run.seconds[-1] / base.seconds[-1],
            joules_saved=1 - run.joules(self.counters)[-1] / base.joules(self.counters)[-1],
            backward_saved=run.backward_saved,
        )

    def differing_settings(self) -> list[str]:
        """Return the names of the settings that differ between runs."""
        names = dict.fromkeys(name for run in self.runs for name in run.config)
        return [
            name
            for name in names
            if name not in _NO_DIFFERENCE
            and any(run.config.get(name) != self.runs[0].config.get(name) for run in self.runs)
        ]


def read_run(folder: Path) -> RunData:
    """Read a run's folder.

    Raises:
        CommandError: the folder holds no run, or the run has not finished an epoch.
    """
    if not (folder / EPOCHS).is_file():
        raise CommandError(f"{folder}: not a run: it has no {EPOCHS}")
    epochs = read_rows(folder / EPOCHS, EpochRow)
    steps = read_rows(folder / STEPS, StepRow)
    if not epochs or not steps:
        raise CommandError(f"{folder}: the run has not finished an epoch")
    config = folder / CONFIG
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"{config}: not a YAML file") from error
    return RunData(
        name=folder.resolve().name,
        config=content if isinstance(content, dict) else {},
        steps=steps,
        epochs=epochs,
    )


def compare_runs(folders: Sequence[Path], baseline: Path | None = None) -> Comparison:
    """Read runs and choose the baseline.

    Args:
        folders: folders of the runs; at least one.
        baseline: folder of the baseline, in `folders` or not. None takes the first run that was
            dense throughout, or the first run if there is none.

    Raises:
        CommandError: a folder holds no run, or a run has not finished an epoch.
    """
    paths = list(dict.fromkeys(path.resolve() for path in [*folders, *filter(None, [baseline])]))
    runs = _name_apart([read_run(path) for path in paths], paths)
    dense = [run for run in runs if run.drop_rate == 0]
    base = runs[paths.index(baseline.resolve())] if baseline else (dense or runs)[0]
    counters = tuple(
        name
        for name in _COUNTERS
        if not any(math.isnan(getattr(row, f"{name}_joules")) for run in runs for row in run.epochs)
    )
    return Comparison(runs=runs, baseline=base, counters=counters)


def _name_apart(runs: list[RunData], paths: list[Path]) -> list[RunData]:
    """Prefix names that several runs share with the parent folder."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{path.parent.name}/{run.name}")
        for run, path in zip(runs, paths, strict=True)
    ]
