"""Schedules as text, such as `bar:rate=0.8,period=2ep`."""

import difflib
from dataclasses import MISSING, fields

from ssprop_fx.schedules import Schedule, bar, constant, cosine, linear, warmup
from ssprop_fx.training.errors import CommandError

__all__ = ["EXAMPLES", "parse_schedule"]

EXAMPLES = {
    "none": "none",
    "constant": "constant:rate=0.5",
    "linear": "linear:start=0,end=0.8,steps=10ep",
    "cosine": "cosine:start=0,end=0.8,steps=10ep",
    "bar": "bar:rate=0.8,period=2ep",
}

_SCHEDULES: dict[str, type[Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "bar": bar,
}
_COUNTS_STEPS = {"steps", "period"}


def parse_schedule(text: str, *, steps_per_epoch: int, warmup_epochs: int = 0) -> Schedule:
    """Return the schedule that `text` describes.

    Args:
        text: `name` or `name:key=value,key=value`; the names are those of `EXAMPLES`, the keys
            those of the schedule of that name. Lengths (`steps`, `period`) are a number of steps,
            or, with `ep` after it, of epochs.
        steps_per_epoch: steps in one epoch.
        warmup_epochs: dense epochs before the schedule begins.

    Returns:
        The schedule, counting steps. `none` is a drop rate of 0 throughout.

    Raises:
        CommandError: `text` describes no schedule; the message says what would be right.

    Example:
        >>> parse_schedule("bar:rate=0.8,period=2ep", steps_per_epoch=100)
        bar(rate=0.8, period=200, dense_fraction=0.5)
    """
    name, _, arguments = text.strip().partition(":")
    if name == "none":
        if arguments:
            raise CommandError(f"--schedule {text}: none takes no settings")
        return constant(0.0)
    if name not in _SCHEDULES:
        raise CommandError(f"--schedule {text}: unknown schedule {name!r}{_suggest(name)}")
    kind = _SCHEDULES[name]
    values = _parse_arguments(text, name, arguments, steps_per_epoch)
    required = [field.name for field in fields(kind) if field.default is MISSING]  # type: ignore[arg-type]
    missing = [key for key in required if key not in values]
    if missing:
        raise _wrong(text, name, f"{name} needs {' and '.join(f'{key}=' for key in missing)}")
    try:
        schedule = kind(**values)
    except ValueError as error:
        raise _wrong(text, name, str(error)) from error
    return warmup(schedule, warmup_epochs * steps_per_epoch) if warmup_epochs else schedule


def _parse_arguments(
    text: str, name: str, arguments: str, steps_per_epoch: int
) -> dict[str, float | int]:
    known = [field.name for field in fields(_SCHEDULES[name])]  # type: ignore[arg-type]
    values: dict[str, float | int] = {}
    for item in arguments.split(",") if arguments else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise _wrong(text, name, f"{name} has {', '.join(known)}, not {key!r}")
        if not equals or not value:
            raise _wrong(text, name, f"{key} needs a value")
        if key in values:
            raise _wrong(text, name, f"{key} is given twice")
        try:
            values[key] = (
                _parse_steps(value, steps_per_epoch) if key in _COUNTS_STEPS else float(value)
            )
        except (ValueError, OverflowError):
            right = (
                "a whole number of steps, or of epochs as in 2ep"
                if key in _COUNTS_STEPS
                else "a number"
            )
            raise _wrong(text, name, f"{key} must be {right}, got {value!r}") from None
    return values


def _parse_steps(value: str, steps_per_epoch: int) -> int:
    if value.endswith("ep"):
        return round(float(value.removesuffix("ep")) * steps_per_epoch)
    return int(value)


def _suggest(name: str) -> str:
    close = difflib.get_close_matches(name, EXAMPLES, n=1)
    return f"; did you mean {EXAMPLES[close[0]]}" if close else f"; known: {', '.join(EXAMPLES)}"


def _wrong(text: str, name: str, what: str) -> CommandError:
    return CommandError(f"--schedule {text}: {what}; right would be {EXAMPLES[name]}")
