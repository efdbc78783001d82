"""Rows: the record of a step or an epoch, and the reader of a run's CSV files."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

__all__ = ["EPOCHS", "STEPS", "EpochRow", "StepRow", "median_ms", "read_rows", "step_times"]

STEPS = "steps.csv"
EPOCHS = "summary.csv"


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One training step.

    Attributes:
        step: number of the step, from 0.
        epoch: the epoch it belongs to, from 0.
        loss: training loss of its batch.
        drop_rate: drop rate of the step; with samples, the share that it left out.
        backward_saved: fraction of the dense backward's FLOPs that the step left out; NaN if
            unknown.
        lr: learning rate of the first parameter group.
        ms: milliseconds from the batch on the device to the end of the optimizer's step.
        timed: 0 for a step that may have compiled a graph, so that `ms` says little; else 1.
        kept_mass: share of the score that the kept channels hold, mean over layers; 1 for a dense
            step; NaN if unknown. On a GPU, the value is some steps old. With samples, the share of
            the kept samples, of this step.
        added_noise: squared norm of what the choice of samples left out or added by weights, as a
            share of the sum over samples; NaN without a choice of samples.
    """

    step: int
    epoch: int
    loss: float
    drop_rate: float
    backward_saved: float
    lr: float
    ms: float
    timed: int
    kept_mass: float = math.nan
    added_noise: float = math.nan


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch.

    Attributes:
        epoch: number of the epoch, from 0.
        step: number of steps of the run at the epoch's end.
        train_loss: mean training loss.
        eval_loss: cross entropy on the validation images, without smoothing.
        eval_top1: share of the validation images that are classified correctly, in percent.
        drop_rate: mean drop rate of its steps.
        backward_saved: mean fraction of the dense backward's FLOPs left out.
        dense_ms: median milliseconds of a step at drop rate 0, NaN if none was timed.
        sparse_ms: the same for a step above drop rate 0.
        images_per_s: training images per second, including loading and compiling.
        lr: learning rate at the epoch's end.
        seconds: seconds of training in the epoch, without validation.
        gpu_joules: joules that the GPUs used in that time, NaN if not measured.
        cpu_joules: the same for the CPU packages and their memory.
    """

    epoch: int
    step: int
    train_loss: float
    eval_loss: float
    eval_top1: float
    drop_rate: float
    backward_saved: float
    dense_ms: float
    sparse_ms: float
    images_per_s: float
    lr: float
    seconds: float
    gpu_joules: float = math.nan
    cpu_joules: float = math.nan


Row = TypeVar("Row", StepRow, EpochRow)


def step_times(steps: Iterable[StepRow], *, sparse: bool) -> list[float]:
    """Return the milliseconds of the timed steps, sparse or dense."""
    return [row.ms for row in steps if row.timed and (row.drop_rate > 0) == sparse]


def median_ms(steps: Iterable[StepRow], *, sparse: bool) -> float:
    """Return the median milliseconds of the timed steps, sparse or dense; NaN if there is none."""
    times = step_times(steps, sparse=sparse)
    return median(times) if times else math.nan


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a file, none if it does not exist.

    A killed process can leave half a row at the end; it is ignored.

    Args:
        path: `steps.csv` or `summary.csv` of a run.
        kind: class of its rows.

    Raises:
        OSError: the file cannot be read.
    """
    types: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    rows: list[Row] = []
    if not path.exists():
        return rows
    with path.open(newline="", encoding="utf-8") as file:
        for values in csv.DictReader(file):
            try:
                rows.append(kind(**{name: types[name](text) for name, text in values.items()}))
            except (KeyError, TypeError, ValueError):
                break
    return rows
