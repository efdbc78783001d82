"""TensorBoardLog: a run's rows as TensorBoard scalars."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.records.rows import EpochRow, StepRow

__all__ = ["TensorBoardLog", "check_tensorboard"]

_STEP_NAMES = ("loss", "drop_rate", "backward_saved", "lr", "ms", "kept_mass", "added_noise")
_EPOCH_NAMES = ("train_loss", "eval_loss", "eval_top1", "images_per_s", "gpu_joules", "cpu_joules")


def check_tensorboard() -> None:
    """Check that TensorBoard is installed.

    Raises:
        CommandError: it is not.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise CommandError(
            "--tensorboard: the package tensorboard is missing: pip install ssprop-fx[tensorboard]"
        ) from error


class TensorBoardLog:
    """Writes rows into event files.

    Args:
        folder: folder of the event files.
        step: the step that the run resumes at; TensorBoard ignores this and later steps of older
            files.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step)

    def add_step(self, row: StepRow) -> None:
        """Add a step's row, at its step."""
        self._add("step", _STEP_NAMES, row, row.step)

    def add_epoch(self, row: EpochRow) -> None:
        """Add an epoch's row, at the step where it ends."""
        self._add("epoch", _EPOCH_NAMES, row, row.step)

    def flush(self) -> None:
        """Write pending rows."""
        self._writer.flush()

    def close(self) -> None:
        """Write pending rows and close the files."""
        self._writer.close()

    def _add(self, group: str, names: tuple[str, ...], row: Any, step: int) -> None:
        values = asdict(row)
        for name in names:
            if not math.isnan(values[name]):
                self._writer.add_scalar(f"{group}/{name}", values[name], step)
