"""Options: each setting is described once, as a field of a dataclass.

From that description come its flag, its environment variable, its key in a YAML file, its row in
docs/configuration.md, and the check of its value:

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        workers: int = option(0, rule="at least 0", help="Load data with this many processes")

The annotation says what the values are: `bool`, `int`, `float`, `str`, a `Literal`, a tuple, a
mapping, a function, or a union of these.
"""

import ast
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

__all__ = ["RULES", "Option", "option", "options_of", "read_pairs"]

RULES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}

_BOOLS = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: of the field.
        kinds: the types that its values may have; None is not among them.
        takes_none: whether None is a value.
        default: its default.
        help: one sentence that says what it does.
        unset: what None stands for.
        metavar: how `--help` shows the value; for a function, its signature.
        choices: the texts that it, or each of its items, may be.
        rule: the range of a number, a key of `RULES`.
        example: a right value, for messages about a mapping.
        short: a short flag.
        inspect: whether `ssprop-fx inspect` has the flag too.
        free_on_resume: whether `ssprop-fx train --resume` may change it.
    """

    name: str
    kinds: tuple[Any, ...]
    takes_none: bool
    default: Any
    help: str
    unset: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    rule: str = ""
    example: Any = None
    short: str = ""
    inspect: bool = False
    free_on_resume: bool = False

    @property
    def flag(self) -> str:
        """Its flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return "SSPROP_" + self.name.upper()

    @property
    def base(self) -> Any:
        """The first of its types without arguments; a dict is a Mapping here."""
        return _base(self.kinds[0])

    @property
    def is_switch(self) -> bool:
        """Whether its values are True and False alone."""
        return self.kinds == (bool,)

    @property
    def has_text(self) -> bool:
        """Whether a text can say a value; a function it cannot."""
        return self.base is not Callable

    @property
    def shown_default(self) -> str:
        """The default as a text, empty if there is nothing to say."""
        if self.default is None or self.default == {}:
            return self.unset
        text = self.to_text(self.default)
        return f"{text}: {self.unset}" if self.unset else text

    def to_text(self, value: Any) -> str:
        """Return a value as a text."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, tuple):
            return " ".join(map(str, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    def from_text(self, text: str) -> Any:
        """Return the value that a text stands for.

        Raises:
            ValueError: the text stands for none.
        """
        for kind in self.kinds:
            try:
                return _read(kind, text.strip())
            except (ValueError, SyntaxError):
                continue
        names_first = sorted(self.kinds, key=lambda kind: _base(kind) is not Literal)
        forms = [form for kind in names_first for form in _text_forms(kind)]
        raise ValueError(f"must be {_join(forms)}, got {text!r}")

    def check(self, value: object) -> None:
        """Check a value.

        Raises:
            TypeError: it has the wrong type.
            ValueError: it is out of its range, or not one of the choices.
        """
        if value is None and self.takes_none:
            return
        if not any(_fits(kind, value) for kind in self.kinds):
            are_names = all(_base(kind) is Literal for kind in self.kinds)
            error = ValueError if are_names else TypeError
            raise error(f"{self.name} must be {self._expected(value)}, got {value!r}")
        items = value if isinstance(value, tuple) else (value,)
        names = {item for item in items if isinstance(item, str)}
        if self.choices and (not names <= set(self.choices) or not items):
            raise ValueError(f"{self.name} must be {self._expected(value)}, got {value!r}")
        if self.rule and isinstance(value, (int, float)) and not RULES[self.rule](value):
            raise ValueError(f"{self.name} must be {self.rule}, got {value!r}")

    def _expected(self, value: object) -> str:
        """Say what a value must be, as Python has it."""
        parts = []
        for kind in self.kinds:
            base = _base(kind)
            if base is bool:
                parts += ["True", "False"]
            elif base is Literal and self.choices:
                parts.append(f"one of {self.choices}")
            elif base is Literal:
                parts += [f'"{name}"' for name in get_args(kind)]
            elif base is tuple and self.choices:
                is_tuple = isinstance(value, tuple)
                parts.append(f"{'' if is_tuple else 'a tuple '}of {self.choices}, at least one")
            elif base is Mapping and self.example:
                as_text = ",".join(f"{key}={item}" for key, item in self.example.items())
                as_dict = "{" + ", ".join(f'"{k}": {v}' for k, v in self.example.items()) + "}"
                is_text = isinstance(value, str)
                parts.append(
                    f"a text such as {as_text}" if is_text else f"a dict such as {as_dict}"
                )
            elif base is str and self.choices:
                parts.append(f"one of {self.choices}")
            elif base is Callable:
                parts.append(f"a callable {self.metavar}" if not self.has_text else "a function")
            else:
                parts.append(_PYTHON_FORMS[base])
        return _join([*parts, "None"] if self.takes_none else parts)


def option(default: Any, *, help: str, **details: Any) -> Any:
    """Return a dataclass field that is an option.

    Args:
        default: its default; a dict is copied for each instance.
        help: one sentence that says what it does, for `--help` and docs/configuration.md.
        details: further attributes of `Option`, such as `rule`, `choices` or `metavar`.
    """
    metadata = {"help": help, **details}
    if isinstance(default, dict):
        return field(default_factory=default.copy, hash=False, metadata=metadata)
    return field(default=default, metadata=metadata)


def options_of(owner: type) -> Mapping[str, Option]:
    """Return the options of a dataclass by name, with those of dataclasses that it holds.

    Raises:
        TypeError: a field is neither an option nor a dataclass of options.
    """
    return _options_of(owner)


@functools.cache
def _options_of(owner: type) -> Mapping[str, Option]:
    found: dict[str, Option] = {}
    hints = get_type_hints(owner)
    for item in fields(owner):
        kinds = _members(hints[item.name])
        if is_dataclass(kinds[0]):
            found |= options_of(kinds[0])  # type: ignore[arg-type]
            continue
        if "help" not in item.metadata:
            raise TypeError(f"{owner.__name__}.{item.name} must be option(default, help=...)")
        details = dict(item.metadata)
        factory = item.default_factory
        values = tuple(kind for kind in kinds if kind is not type(None))
        if len(values) == 1 and _base(values[0]) is Literal:
            details["choices"] = get_args(values[0])
        found[item.name] = Option(
            name=item.name,
            kinds=values,
            takes_none=type(None) in kinds,
            default=item.default if factory is MISSING else factory(),
            **details,
        )
    return found


def read_pairs(items: Iterable[str]) -> dict[str, Any]:
    """Return what texts KEY=VALUE say; a value is a Python literal, or else a text.

    Raises:
        ValueError: one of them is no KEY=VALUE.

    Example:
        >>> read_pairs(["eps=1e-6", "betas=(0.8, 0.9)", "mode=fast"])
        {'eps': 1e-06, 'betas': (0.8, 0.9), 'mode': 'fast'}
    """
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"right would be KEY=VALUE, got {item!r}")
        try:
            pairs[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            pairs[key.strip()] = value.strip()
    return pairs


_TEXT_FORMS: dict[Any, tuple[str, ...]] = {
    bool: ("yes", "no"),
    int: ("a whole number",),
    float: ("a number",),
    str: ("a text",),
    tuple: ("values with commas between them",),
    Mapping: ("KEY=VALUE",),
}

_PYTHON_FORMS = {
    int: "an int",
    float: "a number",
    str: "a str",
    tuple: "a tuple",
    Mapping: "a dict",
}


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _base(kind: Any) -> Any:
    """Return what a type is without its arguments: a dict is a Mapping here."""
    base = get_origin(kind) or kind
    return Mapping if base is dict else base


def _fits(kind: Any, value: object) -> bool:
    base = _base(kind)
    if base is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if base is Any:
        return True
    if base is Callable:
        return callable(value)
    if base is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if base is tuple:
        item_kind = get_args(kind)[0]
        return isinstance(value, tuple) and all(_fits(item_kind, item) for item in value)
    return isinstance(value, base)


def _read(kind: Any, text: str) -> Any:
    base = _base(kind)
    if base is Literal and text in get_args(kind):
        return text
    if base is bool and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if base in (int, float, str):
        return base(text)
    if base is tuple:
        return tuple(_read(get_args(kind)[0], item.strip()) for item in text.split(","))
    if base is Mapping:
        return read_pairs(text.split(",") if text else [])
    raise ValueError(text)


def _text_forms(kind: Any) -> tuple[str, ...]:
    """Say what a text may be to stand for a value."""
    base = _base(kind)
    if base is Literal:
        return get_args(kind)
    return _TEXT_FORMS.get(base, ())


def _join(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} or {last}" if most else last
