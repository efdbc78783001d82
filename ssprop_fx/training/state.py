"""TrainState: everything that changes during a run and goes into a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ssprop_fx.compiler.backward_state import Memory
from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["TrainState"]


@dataclass(kw_only=True)
class TrainState:
    """The changing parts of a run.

    Attributes:
        model: the model, not its compiled form.
        optimizer: the optimizer.
        lr_scheduler: timm's scheduler, stepped by update; None for a constant learning rate.
        scheduler: the sparsity scheduler.
        scaler: timm's gradient scaler, for float16 only.
        ema: timm's moving average of the weights, or None.
        memory: what this process's sparse backwards remember; empty without `--memory` and
            `--score-decay`.
        epoch: the epoch in progress, from 0.
        step: steps done since the run began.
        seconds: seconds of training in this epoch.
        gpu_joules: joules that the GPUs used in that time; NaN if not measured.
        cpu_joules: the same for the CPU packages and their memory.
        best_top1: highest validation accuracy so far in percent; -1 before the first validation.
        best_epoch: the epoch that reached it; -1 before the first validation.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    scheduler: SparsityScheduler
    scaler: Any
    ema: Any = None
    memory: Memory = field(default_factory=Memory)
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    gpu_joules: float = 0.0
    cpu_joules: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = -1
