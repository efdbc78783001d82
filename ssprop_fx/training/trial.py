"""A trial step before training: whether the model takes the images and returns class scores."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ssprop_fx.analysis.fake_capture import run_on_fake_tensors
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.sampling import seeded
from ssprop_fx.training.errors import CommandError, first_line

__all__ = ["check_model"]


def check_model(
    config: TrainConfig, model: nn.Module, input_size: tuple[int, ...], num_classes: int
) -> None:
    """Check that a model takes the images of a run and returns a score for each class.

    Args:
        config: settings of the run.
        model: the model; it does not change.
        input_size: channels, height and width of an image.
        num_classes: number of classes of the dataset.

    Raises:
        CommandError: it does not.
    """
    count = min(config.batch_size, 2)
    try:
        outputs = _outputs(model, count, input_size)
    except Exception as error:
        if count == 1 and _works(model, 2, input_size):
            raise CommandError(
                f"--batch-size 1: {config.model} cannot train on one image: {first_line(error)};"
                " right would be 2 or more"
            ) from error
        size = "x".join(map(str, input_size))
        raise CommandError(
            f"--model {config.model} cannot train on images of {size} (--img-size"
            f" {input_size[-1]}): {first_line(error)}"
        ) from error
    if not isinstance(outputs, Tensor):
        raise CommandError(
            f"--model {config.model} returns a {type(outputs).__name__} in training, and the"
            " trainer needs one tensor of class scores: switch off what adds others, such as"
            " auxiliary heads, with --model-kwargs"
        )
    right = outputs.ndim == 2 and len(outputs) == count and outputs.shape[1] >= num_classes
    if not right:
        raise CommandError(
            f"--model {config.model} returns {list(outputs.shape)} for {count} images, and the"
            f" trainer needs [{count}, {num_classes}], a score for each class"
        )


def _works(model: nn.Module, count: int, input_size: tuple[int, ...]) -> bool:
    try:
        _outputs(model, count, input_size)
    except Exception:
        return False
    return True


def _outputs(model: nn.Module, count: int, input_size: tuple[int, ...]) -> Any:
    """Return what a model returns in training."""
    device = next(model.parameters()).device
    with seeded(0):
        try:
            return run_on_fake_tensors(model, torch.empty(count, *input_size, device="meta"))
        except Exception:
            # Some models read values, which fake tensors do not have.
            images = torch.zeros(count, *input_size, device=device)
            with torch.no_grad():
                return copy.deepcopy(model).train()(images)
