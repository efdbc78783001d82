"""The weights in a file that a run starts from."""

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import load_state_dict
from torch import Tensor, nn

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.folders import shorten
from ssprop_fx.training.errors import CommandError

__all__ = ["create_from_file", "without_weights"]

# Names of classifiers in files whose tensors have other names than timm's.
_CLASSIFIERS = ("head.fc", "head", "fc", "classifier")


def without_weights(config: TrainConfig) -> TrainConfig:
    """Return the settings of a run whose weights come from its own checkpoint."""
    return replace(config, pretrained=False, pretrained_path=None, initial_checkpoint=None)


def create_from_file(config: TrainConfig, settings: Mapping[str, Any]) -> nn.Module | None:
    """Make the model with the weights of `--initial-checkpoint` or `--pretrained-path`.

    If the file has another number of classes, the model gets a new classifier.

    Args:
        config: settings of the run.
        settings: arguments of the model, `num_classes` among them.

    Returns:
        The model, or None if neither flag is given.

    Raises:
        CommandError: the file holds no weights, or they do not fit the model.
    """
    path = config.initial_checkpoint or config.pretrained_path
    if path is None:
        return None
    flag = "--initial-checkpoint" if config.initial_checkpoint else "--pretrained-path"
    if config.initial_checkpoint and config.pretrained_path:
        raise CommandError("--pretrained-path: --initial-checkpoint names a file of weights, too")
    state = _read(flag, path)
    # With as many classes as the file, timm loads every tensor or raises; with fewer it would
    # leave out what does not fit without a word.
    classes = _count_classes(config.model, state)
    fitting = {**settings, "num_classes": classes}
    if config.initial_checkpoint:
        model: nn.Module = timm.create_model(config.model, **fitting)
        _load(model, state, flag, path)
    else:
        model = _create_pretrained(config.model, path, fitting)
    if classes != settings["num_classes"]:
        model.reset_classifier(settings["num_classes"])  # type: ignore[operator]
    return model


def _read(flag: str, path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise CommandError(f"{flag} {path}: no such file")
    try:
        # timm takes the moving average of a run's checkpoint, if there is one.
        state: dict[str, Any] = load_state_dict(path)
    except Exception as error:
        # A damaged file can raise anything.
        raise CommandError(
            f"{flag} {path}: not a file of weights (.safetensors, .pth, .pt), or a damaged one"
        ) from error
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange or not state:
        raise CommandError(f"{flag} {path}: holds no weights, but {shorten(strange, 3)}")
    return state


def _count_classes(model: str, state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of weights; 0 if they have no classifier."""
    config = timm.get_pretrained_cfg(model)
    known = (config.classifier if config is not None else None) or ()
    for name in ((known,) if isinstance(known, str) else tuple(known)) + _CLASSIFIERS:
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.ndim > 1:
            return len(weight)
    return 0


def _create_pretrained(name: str, path: str, settings: Mapping[str, Any]) -> nn.Module:
    # The overlay of timm's training script, which says the same of the file's classes.
    overlay = {"file": path, "custom_load": False, "label_offset": 0}
    overlay["num_classes"] = settings["num_classes"]
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **settings
        )
    except TypeError:
        raise
    except Exception as error:
        # What timm and the model's own conversion raise has no class in common.
        text = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise CommandError(f"--pretrained-path {path}: does not fit {name}: {text}") from error
    return model


def _load(model: nn.Module, state: Mapping[str, Tensor], flag: str, path: str) -> None:
    own = model.state_dict()
    shapes = [
        f"{name} {list(state[name].shape)} for {list(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    faults = (
        ("missing", [name for name in own if name not in state]),
        ("unknown to the model", [name for name in state if name not in own]),
        ("of another shape", shapes),
    )
    told = [_tell(what, names) for what, names in faults if names]
    if told:
        raise CommandError(
            f"{flag} {path}: does not fit the model's {len(own)} tensors: {'; '.join(told)};"
            " --pretrained-path converts the weights of some other sources"
        )
    model.load_state_dict(state)


def _tell(what: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} {what} ({shorten(names, 3)})"
