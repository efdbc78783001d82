"""Flags of the command line, made from options."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, get_args

from ssprop_fx.options import Option, read_pairs

__all__ = ["add_flags"]

_METAVARS = {int: "N", float: "X", str: "NAME"}


def add_flags(group: Any, options: Mapping[str, Option]) -> None:
    """Add a flag for each option that a text can say.

    What the command line does not name is not among the parsed arguments.

    Args:
        group: a parser, or a group of one.
        options: name -> option.
    """
    for option in options.values():
        if option.has_text:
            names = [option.short, option.flag] if option.short else [option.flag]
            shown = f" (default: {option.shown_default})" if option.shown_default else ""
            text = (option.help + shown).replace("%", "%%")
            kwargs = {"dest": option.name, "default": argparse.SUPPRESS, "help": text}
            group.add_argument(*names, **kwargs, **_values(option))


def _values(option: Option) -> dict[str, Any]:
    """Return how argparse is told what values a flag takes."""
    if option.is_switch:
        return {"action": argparse.BooleanOptionalAction}
    if option.base is Mapping:
        return {"action": _Pairs, "nargs": "*", "metavar": "KEY=VALUE"}
    if option.base is tuple:
        values = {"choices": option.choices} if option.choices else {"metavar": "X"}
        return {"action": _Tuple, "nargs": "+", "type": get_args(option.kinds[0])[0], **values}
    if option.choices:
        return {"choices": option.choices}
    # argparse's own messages are good for plain numbers.
    is_number = option.kinds in ((int,), (float,))
    read = option.base if is_number else _reader(option)
    return {"type": read, "metavar": option.metavar or _METAVARS[option.base]}


def _reader(option: Option) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return option.from_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


class _Tuple(argparse.Action):
    """Stores several values as a tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


class _Pairs(argparse.Action):
    """Stores KEY=VALUE pairs as a dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            setattr(namespace, self.dest, read_pairs(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
