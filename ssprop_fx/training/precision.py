"""Layout, autocast and synchronisation of the device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ssprop_fx.training.config import TrainConfig

__all__ = ["autocast", "memory_format", "move_images", "synchronize"]


def memory_format(config: TrainConfig) -> torch.memory_format:
    """Return the layout of weights and images."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def move_images(images: torch.Tensor, config: TrainConfig, device: torch.device) -> torch.Tensor:
    """Return images on `device`, in the layout of the run."""
    layout = memory_format(config)
    return images.to(device, non_blocking=True).contiguous(memory_format=layout)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which the forward pass runs."""
    if not config.amp:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
