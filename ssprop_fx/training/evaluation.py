"""Validation of a run's weights."""

from collections.abc import Iterable

import torch
from timm.utils import distribute_bn
from torch import nn
from tqdm import tqdm

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.loaders import Batch
from ssprop_fx.training.distributed import Processes
from ssprop_fx.training.interrupt import StopRequest
from ssprop_fx.training.precision import autocast, move_images
from ssprop_fx.training.state import TrainState

__all__ = ["evaluate"]


def evaluate(
    config: TrainConfig,
    state: TrainState,
    batches: Iterable[Batch],
    processes: Processes,
    stop: StopRequest,
) -> tuple[float, float] | None:
    """Evaluate the weights, or their moving average if the run has one.

    Args:
        config: settings of the run.
        state: its state.
        batches: the validation images of this process.
        processes: its processes; all of them must call this.
        stop: checked after each batch.

    Returns:
        The loss, without smoothing, and the share of correct answers in percent, both over the
        images of all processes; None if a process was asked to stop during evaluation.
    """
    # The model itself, not its compiled form: the forward pass has nothing to save, and eval mode
    # and other batch sizes would cost compilations.
    model: nn.Module = (state.model if state.ema is None else state.ema.module).eval()
    if processes.world_size > 1:
        # Use the first process's statistics, because the checkpoint holds those.
        distribute_bn(model, processes.world_size, reduce=False)
    loss, correct, count = 0.0, 0, 0
    hide = None if processes.is_first else True
    with torch.no_grad():
        for images, labels in tqdm(batches, desc="validation", leave=False, disable=hide):
            labels = labels.to(processes.device)
            with autocast(config, processes.device):
                outputs = model(move_images(images, config, processes.device))
            outputs = outputs.float()
            loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
            correct += int((outputs.argmax(dim=1) == labels).sum())
            count += len(labels)
            if stop.signal is not None:
                break
    if processes.any(stop.signal is not None):
        return None
    loss, hits, total = processes.sum(loss, correct, count)
    return loss / total, 100 * hits / total
