"""Schedules and controllers as text, such as `bar:rate=0.8,period=2ep` or `kept_mass:target=0.9`.

A text may join several schedules, as in `constant:rate=0.8 until 5ep then none`.
"""

import difflib
import inspect
import re
from collections.abc import Callable
from typing import Any

from ssprop_fx.scheduling.base import Schedule
from ssprop_fx.scheduling.combine import join, warmup
from ssprop_fx.scheduling.controllers import AddedError, Controller, KeptMass
from ssprop_fx.scheduling.sample_rules import AddedNoise, SampleRule
from ssprop_fx.scheduling.schedules import IN_TEXT, constant

__all__ = ["CONTROLLERS", "EXAMPLES", "parse_controller", "parse_schedule"]

_SCHEDULES: dict[str, Callable[..., Schedule]] = {make.__name__: make for make in IN_TEXT}

EXAMPLES = {
    "none": "none",
    **{name: f"{name}:{IN_TEXT[make]}" for name, make in _SCHEDULES.items()},
}

_CONTROLLERS: dict[str, Callable[..., Controller | SampleRule]] = {
    "kept_mass": KeptMass,
    "added_noise": AddedNoise,
    "added_error": AddedError,
}

CONTROLLERS = {
    "kept_mass": "kept_mass:target=0.9,budget=0.6",
    "added_noise": "added_noise:target=0.1",
    "added_error": "added_error:target=0.1",
}

_JOINT = re.compile(r"\s+until\s+(\S+)\s+then\s+")


def parse_schedule(
    text: str, *, steps_per_epoch: int | None = None, warmup_epochs: int = 0
) -> Schedule:
    """Return the schedule that `text` describes.

    Args:
        text: `name` or `name:key=value,key=value`. Names are the keys of `EXAMPLES`; keys are the
            parameters of the function of that name. Lengths (`steps`, `period`) are numbers of
            steps or, if `ep` follows, of epochs. `A until 5ep then B` is `join`: B begins at its
            own step 0 when A ends. More parts may follow.
        steps_per_epoch: steps in one epoch. None if not known; `ep` is then an error.
        warmup_epochs: dense epochs before the schedule begins.

    Returns:
        The schedule, counting steps. `none` is a drop rate of 0 throughout.

    Raises:
        ValueError: `text` is not a schedule; the message is one line that begins with `text` and
            gives a correct example. Or `warmup_epochs` is given without `steps_per_epoch`.

    Examples:
        >>> parse_schedule("bar:rate=0.8,period=2ep", steps_per_epoch=100)
        bar(rate=0.8, period=200, dense_fraction=0.5)
        >>> parse_schedule("bar:rate=0.8,period=2000")
        bar(rate=0.8, period=2000, dense_fraction=0.5)
        >>> parse_schedule("constant:rate=0.8 until 500 then none")
        join(schedules=(constant(rate=0.8), constant(rate=0.0)), boundaries=(500,))
    """
    parts = _JOINT.split(text.strip())
    schedules = [_parse_part(part, steps_per_epoch) for part in parts[::2]]
    schedule = schedules[0]
    if len(schedules) > 1:
        try:
            ends = [_parse_steps(end, steps_per_epoch) for end in parts[1::2]]
            schedule = join(schedules, ends)
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{text}: {error}; right would be"
                " constant:rate=0.8 until 1000 then none, with ends that increase"
            ) from None
    if not warmup_epochs:
        return schedule
    if steps_per_epoch is None:
        raise ValueError("warmup_epochs needs steps_per_epoch")
    return warmup(schedule, warmup_epochs * steps_per_epoch)


def parse_controller(text: str) -> Controller | SampleRule:
    """Return the controller that `text` describes.

    Args:
        text: `name:key=value,key=value`. Names are the keys of `CONTROLLERS`; keys are the
            parameters of `KeptMass`, `AddedNoise` or `AddedError`.

    Raises:
        ValueError: `text` is no controller; the message is one line that begins with `text` and
            gives a correct example.

    Examples:
        >>> parse_controller("kept_mass:target=0.9,budget=0.6")
        KeptMass(target=0.9, budget=0.6, every=20)
    """
    name, arguments = _split(text, "controller", CONTROLLERS)
    try:
        made: Controller | SampleRule = _make(name, _CONTROLLERS[name], arguments, None)
    except ValueError as error:
        raise ValueError(f"{text}: {error}; right would be {CONTROLLERS[name]}") from error
    return made


def _parse_part(text: str, steps_per_epoch: int | None) -> Schedule:
    examples = EXAMPLES if steps_per_epoch else _examples_in_steps()
    name, arguments = _split(text, "schedule", examples)
    try:
        if name != "none":
            made: Schedule = _make(name, _SCHEDULES[name], arguments, steps_per_epoch)
            return made
        if arguments:
            raise ValueError("none takes no settings")
        return constant(0.0)
    except ValueError as error:
        raise ValueError(f"{text}: {error}; right would be {examples[name]}") from error


def _split(text: str, kind: str, examples: dict[str, str]) -> tuple[str, str]:
    """Return the name, which is a key of `examples`, and the arguments."""
    name, _, arguments = text.strip().partition(":")
    if name not in examples:
        close = difflib.get_close_matches(name, examples, n=1)
        hint = f"did you mean {examples[close[0]]}" if close else f"known: {', '.join(examples)}"
        raise ValueError(f"{text}: unknown {kind} {name!r}; {hint}")
    return name, arguments


def _make(name: str, make: Callable[..., Any], arguments: str, steps_per_epoch: int | None) -> Any:
    known = inspect.signature(make, eval_str=True).parameters
    lengths = {key for key, parameter in known.items() if parameter.annotation is int}
    values = _parse_arguments(name, arguments, list(known), lengths, steps_per_epoch)
    required = [key for key, parameter in known.items() if parameter.default is parameter.empty]
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(f'{key}=' for key in missing)}")
    return make(**values)


def _parse_arguments(
    name: str, arguments: str, known: list[str], lengths: set[str], steps_per_epoch: int | None
) -> dict[str, float | int]:
    values: dict[str, float | int] = {}
    for item in arguments.split(",") if arguments else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known:
            raise ValueError(f"{name} has {', '.join(known)}, not {key!r}")
        if not equals or not value:
            raise ValueError(f"{key} needs a value")
        if key in values:
            raise ValueError(f"{key} is given twice")
        is_length = key in lengths
        if is_length and value.endswith("ep") and steps_per_epoch is None:
            raise ValueError(f"{key}={value} is in epochs, but steps per epoch are not known here")
        try:
            values[key] = _parse_steps(value, steps_per_epoch) if is_length else float(value)
        except (ValueError, OverflowError):
            epochs = ", or of epochs as in 2ep" if steps_per_epoch else ""
            right = f"a whole number of steps{epochs}" if is_length else "a number"
            raise ValueError(f"{key} must be {right}, got {value!r}") from None
    return values


def _parse_steps(value: str, steps_per_epoch: int | None) -> int:
    if steps_per_epoch is not None and value.endswith("ep"):
        return round(float(value.removesuffix("ep")) * steps_per_epoch)
    return int(value)


def _examples_in_steps() -> dict[str, str]:
    return {name: re.sub(r"(?<=\d)ep", "000", example) for name, example in EXAMPLES.items()}
