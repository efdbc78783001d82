"""What is kept of a run besides its weights: one CSV row a step, one an epoch."""

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from ssprop_fx.training.files import replace_file
from ssprop_fx.training.records.tensorboard import TensorBoardLog

__all__ = ["EPOCHS", "STEPS", "EpochRow", "Records", "StepRow", "median_ms", "read_rows"]
__all__ += ["step_times"]

STEPS = "steps.csv"
EPOCHS = "summary.csv"


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One training step.

    Attributes:
        step: number of the step, from 0.
        epoch: the epoch it belongs to, from 0.
        loss: training loss of its batch.
        drop_rate: drop rate in force.
        backward_saved: fraction of the dense backward's FLOPs that the step left out; NaN where
            that is not known.
        lr: learning rate of the first parameter group.
        ms: milliseconds from the batch on the device to the end of the optimizer's step.
        timed: 0 for a step that may have compiled a graph: `ms` is no measure of it.
        kept_mass: mean over layers of the share of the score that the kept channels hold, 1 for a
            dense step; on a GPU that of some steps before; NaN where that is not known.
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


@dataclass(frozen=True, kw_only=True)
class EpochRow:
    """One epoch.

    Attributes:
        epoch: number of the epoch, from 0.
        step: number of steps of the run at its end.
        train_loss: mean training loss.
        eval_loss: cross entropy on the validation images, without smoothing.
        eval_top1: share of them that are classified correctly, in percent.
        drop_rate: mean drop rate of its steps.
        backward_saved: mean fraction of the dense backward's FLOPs left out.
        dense_ms: median milliseconds of a step at drop rate 0, NaN if none was timed.
        sparse_ms: the same above drop rate 0.
        images_per_s: training images a second, loading and compiling included.
        lr: learning rate at its end.
        seconds: seconds spent on training in it, without validation.
        gpu_joules: joules that the GPUs used meanwhile, NaN where that is not measured.
        cpu_joules: the same of the CPU packages and their memory.
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
    """Return the milliseconds of the timed steps of one kind."""
    return [row.ms for row in steps if row.timed and (row.drop_rate > 0) == sparse]


def median_ms(steps: Iterable[StepRow], *, sparse: bool) -> float:
    """Return the median milliseconds of the timed steps of one kind, NaN if there is none."""
    times = step_times(steps, sparse=sparse)
    return median(times) if times else math.nan


class Records:
    """The rows of a run, in memory and in `steps.csv` and `summary.csv` of its folder.

    Args:
        folder: the run's folder.
        step: rows of this step and later ones are dropped: the run continues there.
        epoch: rows of this epoch and later ones are dropped.
        tensorboard: whether the rows go to TensorBoard as well, in `tensorboard/`.

    Attributes:
        steps: rows of the steps so far.
        epochs: rows of the epochs so far.

    Raises:
        OSError: a file cannot be read or written.
    """

    def __init__(
        self, folder: Path, *, step: int = 0, epoch: int = 0, tensorboard: bool = False
    ) -> None:
        self._steps_path = folder / STEPS
        self._epochs_path = folder / EPOCHS
        self.steps = [row for row in read_rows(self._steps_path, StepRow) if row.step < step]
        self.epochs = [row for row in read_rows(self._epochs_path, EpochRow) if row.epoch < epoch]
        _write(self._steps_path, StepRow, self.steps)
        _write(self._epochs_path, EpochRow, self.epochs)
        self._log = TensorBoardLog(folder / "tensorboard", step=step) if tensorboard else None
        self._unwritten: list[StepRow] = []

    def add_step(self, row: StepRow) -> None:
        """Add a step's row; it is written by `flush`."""
        self.steps.append(row)
        self._unwritten.append(row)
        if self._log is not None:
            self._log.add_step(row)

    def add_epoch(
        self,
        *,
        epoch: int,
        eval_loss: float,
        eval_top1: float,
        batch_size: int,
        seconds: float,
        gpu_joules: float = math.nan,
        cpu_joules: float = math.nan,
    ) -> EpochRow:
        """Add the row of the epoch whose steps have just ended.

        Args:
            epoch: the epoch.
            eval_loss: validation loss.
            eval_top1: validation accuracy in percent.
            batch_size: training images in a step.
            seconds: seconds spent on training in it.
            gpu_joules: joules that the GPUs used meanwhile.
            cpu_joules: joules that the CPU used meanwhile.

        Returns:
            The row.
        """
        steps = [row for row in self.steps if row.epoch == epoch]
        row = EpochRow(
            epoch=epoch,
            step=steps[-1].step + 1,
            train_loss=fmean(row.loss for row in steps),
            eval_loss=eval_loss,
            eval_top1=eval_top1,
            drop_rate=fmean(row.drop_rate for row in steps),
            backward_saved=fmean(row.backward_saved for row in steps),
            dense_ms=median_ms(steps, sparse=False),
            sparse_ms=median_ms(steps, sparse=True),
            images_per_s=len(steps) * batch_size / seconds,
            lr=steps[-1].lr,
            seconds=seconds,
            gpu_joules=gpu_joules,
            cpu_joules=cpu_joules,
        )
        self.epochs.append(row)
        self.flush()
        _append(self._epochs_path, [row])
        if self._log is not None:
            self._log.add_epoch(row)
        return row

    def flush(self) -> None:
        """Write the steps' rows that are not written yet."""
        _append(self._steps_path, self._unwritten)
        self._unwritten = []
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Write what is not written yet; no row may be added after it."""
        self.flush()
        if self._log is not None:
            self._log.close()


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a file, none if it does not exist.

    A process that is killed can leave half a row at the end, which is left out.

    Args:
        path: `steps.csv` or `summary.csv` of a run.
        kind: what its rows are.

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


def _append(path: Path, rows: list[Any]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(_format(rows))


def _write(path: Path, kind: type[Any], rows: list[Any]) -> None:
    header = ",".join(field.name for field in fields(kind))
    replace_file(path, lambda file: file.write(f"{header}\n{_format(rows)}".encode()))


def _format(rows: list[Any]) -> str:
    # In full precision, so that a run that continues from its files sums up the same numbers.
    return "".join(",".join(map(repr, asdict(row).values())) + "\n" for row in rows)
