"""Checkpoints: plain values and tensors, written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.files import replace_file
from ssprop_fx.training.state import TrainState

__all__ = [
    "BEST",
    "LAST",
    "find_checkpoint",
    "load_checkpoint",
    "restore",
    "save_checkpoint",
]

LAST = "last.pt"
BEST = "best.pt"

_FORMAT = 1


def save_checkpoint(path: Path, state: TrainState, config: TrainConfig) -> None:
    """Write a checkpoint that `torch.load(path, weights_only=True)` reads.

    Its `state_dict` has the model's own keys, so that timm's `load_checkpoint` and
    `--initial-checkpoint` take it as it is.

    Args:
        path: the file.
        state: state of the run.
        config: settings of the run.

    Raises:
        OSError: the folder cannot be written to.
    """
    lr_scheduler, scaler = state.lr_scheduler, state.scaler
    cuda = torch.cuda.is_available()
    content = {
        "format": _FORMAT,
        "arch": config.model,
        "state_dict": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": None if lr_scheduler is None else lr_scheduler.state_dict(),
        "sparsity_scheduler": state.scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "epoch": state.epoch,
        "step": state.step,
        "seconds": state.seconds,
        "best_top1": state.best_top1,
        "best_epoch": state.best_epoch,
        # Dropout and the like draw on these; data order and augmentation have their own seeds.
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        },
        "config": config.to_dict(),
    }
    replace_file(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint`, all tensors on the CPU.

    Raises:
        CommandError: there is no such file, or it is no such checkpoint.
    """
    if not path.is_file():
        raise CommandError(f"--resume {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file can raise anything, KeyError and struct.error among them.
        raise CommandError(f"--resume {path}: not a checkpoint, or a damaged one") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CommandError(f"--resume {path}: not a checkpoint of ssprop-fx train")
    return content


def restore(state: TrainState, content: Mapping[str, Any]) -> None:
    """Put `state` where the run of a checkpoint stopped.

    Args:
        state: state of a run made from the checkpoint's settings.
        content: what `load_checkpoint` returned.
    """
    state.model.load_state_dict(content["state_dict"])
    state.optimizer.load_state_dict(content["optimizer"])
    if state.lr_scheduler is not None:
        state.lr_scheduler.load_state_dict(content["lr_scheduler"])
    state.scheduler.load_state_dict(content["sparsity_scheduler"])
    if state.scaler is not None:
        state.scaler.load_state_dict(content["scaler"])
    for name in ("epoch", "step", "seconds", "best_top1", "best_epoch"):
        setattr(state, name, content[name])
    torch.set_rng_state(content["rng"]["cpu"])
    # A run may continue on a machine with another number of devices, or with none.
    if len(content["rng"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(content["rng"]["cuda"])


def find_checkpoint(path: str, output: str, experiment: str | None) -> Path:
    """Return the checkpoint that `--resume` means.

    Args:
        path: a checkpoint, the folder of a run, or empty: the experiment's last checkpoint if one
            is named, else the newest in `output`.
        output: folder of all runs.
        experiment: name of one.

    Raises:
        CommandError: there is none.
    """
    if path:
        return Path(path) / LAST if Path(path).is_dir() else Path(path)
    if experiment is not None:
        return Path(output) / experiment / LAST
    candidates = list(Path(output).glob(f"*/{LAST}"))
    if not candidates:
        raise CommandError(f"--resume: no run in {output} has a {LAST}")
    return max(candidates, key=lambda candidate: candidate.stat().st_mtime)
