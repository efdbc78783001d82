"""Settings of a run as YAML: what `--config` reads and what a run keeps of itself."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from ssprop_fx.options import Option, options_of
from ssprop_fx.training.augmentation import Augmentation
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.files import replace_file

__all__ = ["CONFIG", "read_arguments", "write_config"]

CONFIG = "config.yaml"

# These name one run, and the file is for more of them.
_LEFT_OUT = {"output", "experiment"}


def read_arguments(path: str) -> list[str]:
    """Return the arguments of the command line that a file stands for.

    In that form they are checked and converted as those of the command line are; YAML alone would
    take `lr: 1e-3` for a text.

    Args:
        path: a YAML file that maps names of flags, with `_` or `-`, to values. True and false turn
            a switch on and off, a list holds several values, a mapping those of a flag that takes
            KEY=VALUE, and null leaves the default. Keys of `--aug-kwargs` may be among the names.

    Raises:
        CommandError: the file cannot be read, is no such mapping, or has an unknown name.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"--config {path}: not a YAML file: {error}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise CommandError(f"--config {path}: right would be lines such as `batch_size: 64`")
    options = {name: option for name, option in options_of(TrainConfig).items() if option.has_text}
    rare = options_of(Augmentation)
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in options and name not in rare:
            close = difflib.get_close_matches(name, [*options, *rare], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise CommandError(f"--config {path}: unknown key {key!r}{hint}")
        settings[name] = value
    pairs = {name: settings.pop(name) for name in rare if name in settings}
    given = settings.get("aug_kwargs") or {}
    if pairs and isinstance(given, dict):
        settings["aug_kwargs"] = {**given, **pairs}
    return [text for name, value in settings.items() for text in _argument(options[name], value)]


def write_config(path: Path, config: TrainConfig) -> None:
    """Write the settings of a run for `--config`, without those that are None.

    Args:
        path: the file.
        config: settings of the run.

    Raises:
        OSError: the file cannot be written.
    """
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.to_dict().items()
        if value is not None and name not in _LEFT_OUT
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    replace_file(path, lambda file: file.write(text.encode()))


def _argument(option: Option, value: Any) -> list[str]:
    flag = option.flag
    if value is None:
        return []
    if isinstance(value, bool):
        if option.is_switch or option.base is not bool:
            return [flag if value else "--no-" + flag.removeprefix("--")]
        return [f"{flag}={option.to_text(value)}"]
    if isinstance(value, dict):
        return [flag, *(f"{key}={item!r}" for key, item in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    # In one piece, so that a value may begin with a hyphen.
    return [f"{flag}={value}"]
