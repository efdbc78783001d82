"""Print docs/configuration.md: python docs/configuration.py > docs/configuration.md."""

from collections.abc import Callable, Iterable, Mapping
from typing import get_args

from ssprop_fx.config import SparsityConfig
from ssprop_fx.options import Option, options_of
from ssprop_fx.training.augmentation import Augmentation
from ssprop_fx.training.settings import GROUPS

_INTRO = """\
# Configuration

Every setting, its default and its names. This page is made from the code:

    python docs/configuration.py > docs/configuration.md

## Sparse back-propagation

A field of `SparsityConfig` has one name everywhere:

| where | how to write it |
|---|---|
| Python | `SparsityConfig(min_channels=64)` |
| `ssprop-fx train`, and `ssprop-fx inspect` where the table says so | `--min-channels 64` |
| YAML file of `ssprop-fx train --config` | `min_channels: 64` |
| `torch.compile(model, backend="ssprop", options=...)` | `{"min_channels": 64}` |
| environment of the backend `ssprop` | `SSPROP_MIN_CHANNELS=64` |

In the environment, separate several values with commas: `SSPROP_TARGETS=conv,linear`,
`SSPROP_RATES='layer4.*=0.9,stem.*=0'`. Write switches as `yes` or `no`; flags are `--gate` and
`--no-gate`. `select` and `score` also take a function in Python. The backend `ssprop` reads keep
counts at run time, so it refuses `specialize=True`. It has more settings, `SSPROP_SCHEDULE`,
`SSPROP_CONTROLLER`, `SSPROP_START_STEP` and `SSPROP_BACKEND`; see the
[guide](guide.md#the-backend-ssprop).
"""

_TRAINER = """\
## The trainer

These are flags of `ssprop-fx train` and keys of its YAML file, next to those above. In YAML, `true`
and `false` turn a switch on and off. `--aug` turns a switch on, `--no-aug` turns it off.
"""

_AUGMENTATION = """\
## Keys of `--aug-kwargs`

`--aug-kwargs hflip=0 scale=0.5,1.0` changes these settings of timm's augmentation. In YAML:
`aug_kwargs: {hflip: 0, scale: [0.5, 1.0]}`.
"""


def page() -> str:
    """Return docs/configuration.md."""
    parts = [_INTRO, _table(("field", "values", "default", "names", "what it does"), _fields())]
    parts.append(_TRAINER)
    sparsity = options_of(SparsityConfig)
    for group in GROUPS:
        options = [o for name, o in options_of(group).items() if name not in sparsity]
        parts.append(f"### {group.title.capitalize()}\n")
        parts.append(_table(("flag", "values", "default", "what it does"), _flags(options)))
    keys = [
        (f"`{key.name}`", _values(key), _default(key), key.help)
        for key in options_of(Augmentation).values()
    ]
    parts += [_AUGMENTATION, _table(("key", "values", "default", "what it does"), keys)]
    return "\n".join(parts)


def _fields() -> Iterable[tuple[str, ...]]:
    for option in options_of(SparsityConfig).values():
        names = f"`{option.flag}`, `{option.variable}`" if option.has_text else "Python only"
        if option.inspect:
            names += ", in `inspect` too"
        yield f"`{option.name}`", _values(option), _default(option), names, option.help


def _flags(options: Iterable[Option]) -> Iterable[tuple[str, ...]]:
    for option in options:
        flag = f"`{option.flag}`" + (f", `{option.short}`" if option.short else "")
        yield flag, _values(option), _default(option), option.help


def _values(option: Option) -> str:
    if option.choices:
        text = ", ".join(f"`{choice}`" for choice in option.choices)
        return f"some of {text}" if option.base is tuple else text
    names = {int: "whole number", float: "number", str: "text", bool: "switch"}
    names |= {tuple: "numbers", Mapping: "`KEY=VALUE`", Callable: f"function `{option.metavar}`"}
    literals = [f"`{name}`" for kind in option.kinds[1:] for name in get_args(kind)]
    text = " or ".join([names[option.base], *literals])
    return f"{text}, {option.rule}" if option.rule else text


def _default(option: Option) -> str:
    if option.default is None or option.default == {}:
        return option.unset or "none"
    shown = f"`{option.to_text(option.default)}`"
    return f"{shown}: {option.unset}" if option.unset else shown


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
