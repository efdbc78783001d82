"""Checkpoints: plain values and tensors, written atomically."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.distributed import Processes
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

_FORMAT = 4
_COUNTERS = ("epoch", "step", "seconds", "gpu_joules", "cpu_joules", "best_top1", "best_epoch")


def save_checkpoint(
    path: Path,
    state: TrainState,
    config: TrainConfig,
    processes: Processes | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that `torch.load(path, weights_only=True)` reads.

    Its `state_dict` has the model's own keys, so timm's `load_checkpoint` and
    `--initial-checkpoint` read it unchanged; with a moving average they read `state_dict_ema`.

    Args:
        path: the file.
        state: state of the run.
        config: settings of the run.
        processes: processes of the run. All of them must call this; the first one writes.
        data: what the run's data is, as `describe_data` says it.

    Raises:
        OSError: the file cannot be written; an existing file stays unchanged.
    """
    processes = processes or Processes()
    # Dropout and similar layers use these; data order and augmentation have their own seeds.
    rng = processes.gather(_random_state(_device(state)))
    # Each process has its own memory: it sees its own share of the batches.
    memory = processes.gather(
        {name: tensor.cpu() for name, tensor in state.memory.state_dict().items()}
    )
    if not processes.is_first:
        return
    lr_scheduler, scaler = state.lr_scheduler, state.scaler
    content = {
        "format": _FORMAT,
        "arch": config.model,
        "state_dict": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": None if lr_scheduler is None else lr_scheduler.state_dict(),
        "sparsity_scheduler": state.scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        **{name: getattr(state, name) for name in _COUNTERS},
        "rng": rng,
        "memory": memory,
        "config": config.to_dict(),
        "data": data,
    }
    if state.ema is not None:
        content["state_dict_ema"] = state.ema.module.state_dict()
    replace_file(path, lambda file: _save(content, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint`, with all tensors on the CPU.

    Raises:
        CommandError: the file does not exist, or `save_checkpoint` did not write it.
    """
    if not path.is_file():
        raise CommandError(f"--resume {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file can raise anything, such as KeyError or struct.error.
        raise CommandError(f"--resume {path}: not a checkpoint, or a damaged one") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CommandError(f"--resume {path}: not a checkpoint of ssprop-fx train")
    return content


def restore(
    state: TrainState, content: Mapping[str, Any], processes: Processes | None = None
) -> None:
    """Set `state` to the point where the checkpoint's run stopped.

    Args:
        state: state of a run with the checkpoint's settings.
        content: the result of `load_checkpoint`.
        processes: processes of the run.

    Raises:
        CommandError: the run had a different number of processes.
    """
    processes = processes or Processes()
    before = len(content["rng"])
    if before != processes.world_size:
        raise CommandError(
            f"--resume: the run had {before} processes, which shared its batches, and has"
            f" {processes.world_size} now; start as many as before"
        )
    state.model.load_state_dict(content["state_dict"])
    state.optimizer.load_state_dict(content["optimizer"])
    if state.lr_scheduler is not None:
        state.lr_scheduler.load_state_dict(content["lr_scheduler"])
    state.scheduler.load_state_dict(content["sparsity_scheduler"])
    if state.scaler is not None:
        state.scaler.load_state_dict(content["scaler"])
    if state.ema is not None:
        state.ema.module.load_state_dict(content["state_dict_ema"])
    state.memory.load_state_dict(content["memory"][processes.rank])
    for name in _COUNTERS:
        setattr(state, name, content[name])
    _set_random_state(content["rng"][processes.rank], _device(state))


def find_checkpoint(path: str, output: str, experiment: str | None) -> Path:
    """Return the checkpoint that `--resume` means.

    Args:
        path: a checkpoint or the folder of a run. If empty, use the last checkpoint of
            `experiment`, or the newest one in `output` if `experiment` is None.
        output: folder of all runs.
        experiment: name of a run, or None.

    Raises:
        CommandError: `output` has no checkpoint.
    """
    if path:
        return Path(path) / LAST if Path(path).is_dir() else Path(path)
    if experiment is not None:
        return Path(output) / experiment / LAST
    candidates = list(Path(output).glob(f"*/{LAST}"))
    if not candidates:
        raise CommandError(f"--resume: no run in {output} has a {LAST}")
    return max(candidates, key=lambda candidate: candidate.stat().st_mtime)


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # torch's writer raises this when a write fails; the cause is the file's own error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def _device(state: TrainState) -> torch.device:
    return next(state.model.parameters()).device


def _random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all generators of this process, as plain values and tensors."""
    name, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    # A run may continue on a machine without a GPU.
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
