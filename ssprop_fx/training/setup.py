"""What a run is made of: device, model, optimizer, schedulers."""

from dataclasses import replace
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn

from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.config import SparsityConfig
from ssprop_fx.runtime.constant_counts import MAX_LEVELS
from ssprop_fx.scheduling.parse import parse_schedule
from ssprop_fx.scheduling.scheduler import SparsityScheduler
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.datasets import Datasets
from ssprop_fx.training.errors import CommandError, first_line, flag_error, unknown_name
from ssprop_fx.training.state import TrainState
from ssprop_fx.training.trial import check_model
from ssprop_fx.training.weights import create_from_file

__all__ = [
    "check_names",
    "check_rates",
    "create_data_config",
    "create_model",
    "create_state",
    "find_device",
    "sparsity_config",
]

# timm's own default, 90, is meant for runs on ImageNet.
_STEP_EPOCHS = 30.0


def check_names(config: TrainConfig) -> None:
    """Check the names that timm knows, before anything slow is done.

    Raises:
        CommandError: timm has no such model or optimizer.
    """
    if not timm.is_model(config.model):
        raise unknown_name("--model", config.model, timm.list_models())
    if config.opt not in list_optimizers():
        raise unknown_name("--opt", config.opt, list_optimizers())


def find_device(name: str | None) -> torch.device:
    """Return the device of that name; None is CUDA where there is one, else the CPU.

    Raises:
        CommandError: torch has no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"--device {name}: torch cannot use it here") from error
    return device


def create_data_config(config: TrainConfig, datasets: Datasets) -> dict[str, Any]:
    """Return input size and normalisation: the flags', else the dataset's, else the model's."""
    model_config = timm.get_pretrained_cfg(config.model)
    given = {
        name: getattr(config, name)
        for name in ("img_size", "mean", "std", "interpolation", "crop_pct")
        if getattr(config, name) is not None
    }
    defaults = dict(datasets.data_config)
    if "img_size" in given:
        # timm puts input_size before img_size.
        defaults.pop("input_size", None)
    resolved: dict[str, Any] = resolve_data_config(
        {**defaults, **given}, pretrained_cfg=model_config.to_dict() if model_config else None
    )
    return resolved


def create_model(config: TrainConfig, num_classes: int, image_size: int) -> nn.Module:
    """Make the model with timm.

    Args:
        config: settings of the run.
        num_classes: number of classes in the dataset.
        image_size: height and width of the images in pixels.

    Raises:
        CommandError: the model does not take a setting, its weights cannot be had, or it cannot
            train on such images.
    """
    if config.num_classes is not None and config.num_classes < num_classes:
        raise CommandError(
            f"--num-classes {config.num_classes} is fewer than the {num_classes} of the dataset"
        )
    settings: dict[str, Any] = {"num_classes": config.num_classes or num_classes}
    settings.update(config.model_kwargs or {})
    if config.drop_path is not None:
        settings["drop_path_rate"] = config.drop_path
    model_config = timm.get_pretrained_cfg(config.model)
    if model_config is not None and model_config.fixed_input_size:
        settings["img_size"] = image_size
    try:
        model = create_from_file(config, settings)
        if model is None:
            model = timm.create_model(config.model, pretrained=config.pretrained, **settings)
    except CommandError:
        raise
    except TypeError as error:
        raise CommandError(f"--model {config.model} does not take it: {error}") from error
    except Exception as error:
        # Hub, network and file errors have no class in common, nor those of sizes that do not fit.
        if not config.pretrained:
            raise CommandError(f"--model {config.model}: {first_line(error)}") from error
        raise CommandError(f"--pretrained: {config.model} has no weights here: {error}") from error
    check_model(config, model, (3, image_size, image_size), num_classes)
    return model


def create_state(config: TrainConfig, model: nn.Module, steps_per_epoch: int) -> TrainState:
    """Make optimizer and schedulers for `model`, at the beginning of a run.

    Raises:
        CommandError: the optimizer, a controller or `--specialize` does not take a setting.
    """
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **(config.opt_kwargs or {}),
        )
    except (TypeError, ValueError) as error:
        raise CommandError(f"--opt {config.opt}: {error}") from error
    further = {"decay_epochs": _STEP_EPOCHS} if config.sched == "step" else {}
    try:
        lr_scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **{**further, **(config.sched_kwargs or {})},
        )
    except (TypeError, ValueError) as error:
        raise CommandError(f"--sched {config.sched}: {error}") from error
    assert config.schedule is not None
    schedule = parse_schedule(
        config.schedule,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=config.sparsity_warmup_epochs,
    )
    levels = None if config.has_controller else schedule.levels
    if config.sparsity.specialize is True and (levels is None or len(levels) > MAX_LEVELS):
        raise CommandError(
            f"--specialize must be auto or no here: yes needs a schedule with at most {MAX_LEVELS}"
            " drop rates, and no --controller"
        )
    device = next(model.parameters()).device
    needs_scaler = config.amp and config.amp_dtype == "float16"
    return TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        scheduler=SparsityScheduler(schedule, config.create_controller()),
        scaler=NativeScaler(device=device.type) if needs_scaler else None,
        ema=ModelEmaV3(model, config.model_ema_decay, use_warmup=config.model_ema_warmup)
        if config.model_ema
        else None,
    )


def sparsity_config(config: TrainConfig) -> SparsityConfig:
    """Return which layers take part and how channels are chosen; a controller needs telemetry."""
    adapts_layers = config.has_controller and config.sparsity.axis == "channel"
    return replace(config.sparsity, telemetry=config.sparsity.telemetry or adapts_layers)


def check_rates(sparsity: SparsityConfig, model: nn.Module) -> None:
    """Check that the drop rates of layers fit a model.

    Raises:
        CommandError: they do not.
    """
    try:
        find_slots(model, sparsity)
    except (TypeError, ValueError) as error:
        raise flag_error(error) from error
