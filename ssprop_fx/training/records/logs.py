"""Records: the rows of a run in memory, in its CSV files and optionally in TensorBoard."""

import math
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from ssprop_fx.training.files import replace_file
from ssprop_fx.training.records.rows import EPOCHS, STEPS, EpochRow, StepRow, median_ms, read_rows
from ssprop_fx.training.records.tensorboard import TensorBoardLog

__all__ = ["Records"]


class Records:
    """The rows of a run, in memory and in `steps.csv` and `summary.csv` of its folder.

    Args:
        folder: the run's folder.
        step: the step that the run resumes at; its row and later rows are discarded.
        epoch: the epoch that the run resumes at; its row and later rows are discarded.
        tensorboard: whether to write the rows to TensorBoard as well, in `tensorboard/`.

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
        """Add a step's row; `flush` writes it."""
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
        """Add and write the row of an epoch that just ended.

        Args:
            epoch: the epoch.
            eval_loss: validation loss.
            eval_top1: validation accuracy in percent.
            batch_size: training images in a step.
            seconds: seconds of training in the epoch.
            gpu_joules: joules that the GPUs used in that time.
            cpu_joules: joules that the CPU used in that time.

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
        """Write the pending rows of steps."""
        _append(self._steps_path, self._unwritten)
        self._unwritten = []
        if self._log is not None:
            self._log.flush()

    def close(self) -> None:
        """Write the pending rows; add no row afterwards."""
        self.flush()
        if self._log is not None:
            self._log.close()


def _append(path: Path, rows: list[Any]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(_format(rows))


def _write(path: Path, kind: type[Any], rows: list[Any]) -> None:
    header = ",".join(field.name for field in fields(kind))
    replace_file(path, lambda file: file.write(f"{header}\n{_format(rows)}".encode()))


def _format(rows: list[Any]) -> str:
    # In full precision, so that a resumed run sums the same numbers.
    return "".join(",".join(map(repr, asdict(row).values())) + "\n" for row in rows)
