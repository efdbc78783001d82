"""The sparse variants that a benchmark compares: one SparsityConfig for each."""

import argparse
import ast
from collections.abc import Sequence
from dataclasses import fields, replace

from ssprop_fx import SparsityConfig
from ssprop_fx.config import TARGETS

__all__ = ["NAME", "add_config_arguments", "configs_of", "parse_overrides", "variants_of"]

# Name of the rows of `ssprop_compile`; overrides, if any, follow it.
NAME = "ssprop"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `configs_of` reads."""
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--min-channels", type=int, default=SparsityConfig.min_channels)
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="FIELD=VALUE[,FIELD=VALUE]",
        help="add a sparse row: the SparsityConfig with these fields changed, such as"
        " channel_multiple=8; repeat for more rows",
    )


def configs_of(args: argparse.Namespace) -> dict[str, SparsityConfig]:
    """Return the configurations to compare, by name of their rows, the plain one first.

    Raises:
        ValueError: a `--variant` has the wrong form.
    """
    base = SparsityConfig(min_channels=args.min_channels, targets=tuple(args.targets))
    return {NAME: base, **variants_of(args.variant, base, NAME)}


def variants_of(texts: Sequence[str], base: SparsityConfig, name: str) -> dict[str, SparsityConfig]:
    """Return a configuration for each `--variant`, by name of its rows.

    Args:
        texts: overrides, as `parse_overrides` reads them.
        base: what they change.
        name: name of the rows of `base`.
    """
    return {f"{name} {text}": replace(base, **parse_overrides(text)) for text in texts}


def parse_overrides(text: str) -> dict[str, object]:
    """Return fields of SparsityConfig from text.

    Args:
        text: comma-separated `field=value`; values are Python literals, else strings.

    Returns:
        Field -> value.

    Raises:
        ValueError: a part has no `=`, or its field does not exist.

    Example:
        >>> parse_overrides("channel_multiple=8,min_channels=16")
        {'channel_multiple': 8, 'min_channels': 16}
        >>> parse_overrides("channel_multiple=auto")
        {'channel_multiple': 'auto'}
    """
    known = [field.name for field in fields(SparsityConfig)]
    overrides: dict[str, object] = {}
    for part in text.split(","):
        field, equals, value = part.partition("=")
        if not equals or field not in known:
            raise ValueError(f"--variant must be FIELD=VALUE with a field of {known}, got {part!r}")
        try:
            overrides[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[field] = value
    return overrides
