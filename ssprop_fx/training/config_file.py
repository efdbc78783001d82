"""Settings of a run as YAML: what `--config` reads and what a run keeps of itself."""

import difflib
from pathlib import Path
from typing import Any

import yaml

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.files import replace_file

__all__ = ["CONFIG", "read_arguments", "write_config"]

CONFIG = "config.yaml"

# These name one run, and the file is for more of them.
_LEFT_OUT = {"output", "experiment"}


def read_arguments(path: str, known: set[str]) -> list[str]:
    """Return the arguments of the command line that a file stands for.

    In that form they are checked and converted as those of the command line are; YAML alone would
    take `lr: 1e-3` for a text.

    Args:
        path: a YAML file that maps names of flags, with `_` or `-`, to values. True and false turn
            a switch on and off, a list holds several values, a mapping those of a flag that takes
            KEY=VALUE, and null leaves the default.
        known: names that there are, with `_`.

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
    arguments = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise CommandError(f"--config {path}: unknown key {key!r}{hint}")
        arguments += _argument("--" + name.replace("_", "-"), value)
    return arguments


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


def _argument(flag: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if isinstance(value, dict):
        return [flag, *(f"{key}={item!r}" for key, item in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    # In one piece, so that a value may begin with a hyphen.
    return [f"{flag}={value}"]
