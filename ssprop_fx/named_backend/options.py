"""Settings of the no-edit backend, from `torch.compile(options=...)` and the environment."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ssprop_fx.compiler.backend import BACKENDS
from ssprop_fx.compiler.inductor import inductor_options, is_inductor_option
from ssprop_fx.config import SparsityConfig
from ssprop_fx.options import options_of
from ssprop_fx.scheduling.base import Schedule
from ssprop_fx.scheduling.controllers import Controller
from ssprop_fx.scheduling.parse import parse_controller, parse_schedule
from ssprop_fx.scheduling.sample_rules import SampleRule, default_rule

__all__ = ["Settings", "read_settings"]

_PREFIX = "SSPROP_"
_OPTIONS = options_of(SparsityConfig)
# Shows the log; no setting of a model.
_LOG = "SSPROP_LOG"


@dataclass(frozen=True)
class Settings:
    """Settings of one model under the no-edit backend.

    Attributes:
        schedule: step -> drop rate; None with a controller alone: every step is sparse.
        start_step: the step in force at first, to continue a run that was interrupted.
        config: which layers take part.
        kind: the compiler, `"inductor"` or `"aot_eager"`.
        inductor: Inductor configuration patches.
        controller: decides how much is kept; None if the schedule does.
    """

    schedule: Schedule | None
    start_step: int = 0
    config: SparsityConfig = field(default_factory=SparsityConfig)
    kind: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    controller: Controller | SampleRule | None = None


def read_settings(
    mode: str | None, options: Mapping[str, Any] | None, environ: Mapping[str, str]
) -> Settings:
    """Return the settings that `torch.compile` arguments and the environment give.

    Without a schedule and without a controller, samples are chosen by `default_rule()`. The names
    are `schedule`, `controller`, `start_step`, `backend` and the fields of `SparsityConfig`; in the
    environment they are in capitals with `SSPROP_` before them. Options go before the environment,
    and whatever else they hold is Inductor's.

    Args:
        mode: as in `torch.compile`.
        options: as in `torch.compile`.
        environ: the environment.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: there is no schedule for channels, or a setting is unknown or out of its range.

    Examples:
        >>> settings = read_settings(None, {"min_channels": 64}, {"SSPROP_SCHEDULE": "none"})
        >>> settings.schedule, settings.config.min_channels
        (constant(rate=0.0), 64)
        >>> settings = read_settings(None, {}, {})
        >>> settings.controller, settings.config.axis
        (AddedNoise(target=0.1, budget=None), 'sample')
    """
    options = dict(options or {})
    names = {"schedule", "controller", "start_step", "backend", *_OPTIONS}
    given: dict[str, tuple[str, Any]] = {}
    for variable in environ:
        if variable.startswith(_PREFIX) and variable != _LOG:
            name = variable.removeprefix(_PREFIX).lower()
            if name in _OPTIONS and not _OPTIONS[name].has_text:
                hint = f": {name} is a function, so give it in torch.compile(options=...)"
                raise ValueError(f"{variable} in the environment is unknown{hint}")
            if name not in names:
                known = [f"{_PREFIX}{other.upper()}" for other in names]
                hint = _suggest(variable, known)
                raise ValueError(f"{variable} in the environment is unknown{hint}")
            given[name] = (variable, environ[variable].strip())
    for name in names & options.keys():
        given[name] = (f"options[{name!r}]", options.pop(name))
    for name in options:
        if not is_inductor_option(name):
            hint = _suggest(name, names)
            raise ValueError(f"options[{name!r}] is neither ssprop's nor Inductor's{hint}")

    checks: dict[str, Callable[[object], Any]] = {
        "schedule": _schedule,
        "controller": _controller,
        "start_step": _start_step,
        "backend": _kind,
    }
    values: dict[str, Any] = {}
    for name, (source, value) in given.items():
        try:
            check = checks.get(name)
            values[name] = check(value) if check else _config_value(name, value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{source}: {error}") from error
    schedule, controller = values.pop("schedule", None), values.pop("controller", None)
    if schedule is None and controller is None:
        if values.setdefault("axis", "sample") == "channel":
            raise ValueError(
                "the ssprop backend needs a schedule for channels, such as"
                " SSPROP_SCHEDULE=bar:rate=0.8,period=2000 in the environment, or"
                ' torch.compile(model, backend="ssprop",'
                ' options={"schedule": "bar:rate=0.8,period=2000"})'
            )
        controller = default_rule()
    start_step = values.pop("start_step", 0)
    kind = values.pop("backend", "inductor")
    if kind != "inductor" and (mode is not None or options):
        raise ValueError(f"mode and Inductor's options do not fit the inner backend {kind!r}")
    inductor = inductor_options(mode, options) if kind == "inductor" else {}
    config = SparsityConfig(**values)
    return Settings(schedule, start_step, config, kind, inductor, controller)


def _schedule(value: object) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if not isinstance(value, str):
        raise TypeError(f"must be a schedule or a text that describes one, got {value!r}")
    if not value.strip():
        raise ValueError("must not be empty: right would be bar:rate=0.8,period=2000, or none")
    return parse_schedule(value)


def _controller(value: object) -> Controller | SampleRule:
    if isinstance(value, (Controller, SampleRule)):
        return value
    if not isinstance(value, str):
        raise TypeError(f"must be a controller or a text that describes one, got {value!r}")
    return parse_controller(value)


def _start_step(value: object) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"must be a number of steps, 0 or more, got {value!r}")
    return value


def _kind(value: object) -> str:
    if value not in BACKENDS:
        raise ValueError(f"must be one of {BACKENDS}, got {value!r}")
    return str(value)


def _config_value(name: str, value: object) -> object:
    """Return the value of one field of SparsityConfig, from a text where it is one."""
    if isinstance(value, str):
        try:
            value = _OPTIONS[name].from_text(value)
        except ValueError as error:
            # A text that is no mapping stays one: SparsityConfig has an example for it.
            if _OPTIONS[name].base is not Mapping:
                raise ValueError(f"{name} {error}") from None
    if name == "specialize" and value is True:
        raise ValueError(
            'specialize must be "auto" or False with this backend, which reads keep counts at run'
            " time; ssprop_compile can compile them in"
        )
    SparsityConfig(**{name: value})  # type: ignore[arg-type]
    return value


def _suggest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else f": known are {', '.join(sorted(known))}"
