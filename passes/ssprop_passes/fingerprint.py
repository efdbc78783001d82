"""A text that identifies what a function computes: the compile cache must tell selectors apart."""

import builtins
import dis
import functools
import hashlib
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["identity_maybe", "sources_hash"]

# The compile cache's key covers these packages: ours by `sources_hash`, the others by release.
_KNOWN_PACKAGES = ("_operator", "builtins", "math", "operator", "ssprop_passes", "torch")

# The code that calls these built-ins does not show what they read.
_UNKNOWN_BUILTINS = ("__import__", "eval", "exec", "globals", "open", "vars")

_PLAIN = (type(None), type(...), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class _UnknownError(Exception):
    """A function uses something that may change without a change of its description."""


@cache
def sources_hash() -> str:
    """Return a hash of this package's sources, so that an edited pass misses the compile cache."""
    digest = hashlib.sha256()
    files = Path(__file__).parent.rglob("*")
    for path in sorted(file for file in files if file.suffix in (".py", ".cpp")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def identity_maybe(fn: Callable[..., Any]) -> str | None:
    """Return a hash that changes with what a function computes; None if that cannot be known.

    The hash covers the function's bytecode, constants, defaults, closure and the globals it reads,
    and recursively any functions among these. Functions of torch and of this package count by
    name. The result is None if the function depends on other packages or on stateful objects.

    Args:
        fn: the function.

    Examples:
        >>> def scaled(by):
        ...     return lambda scores, k: torch.topk(scores * by, k).indices
        >>> identity_maybe(scaled(2)) == identity_maybe(scaled(2)) != identity_maybe(scaled(3))
        True
        >>> identity_maybe(scaled(object())) is None
        True
    """
    try:
        parts = _describe(fn, set())
    except _UnknownError:
        return None
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _describe(value: Any, seen: set[int]) -> Any:
    if type(value) in _PLAIN:
        return repr(value)
    if type(value) in (tuple, list):
        return [type(value).__name__, *(_describe(entry, seen) for entry in value)]
    if type(value) is frozenset:
        return sorted(repr(_describe(entry, seen)) for entry in value)
    if type(value) is functools.partial:
        keywords = tuple(sorted(value.keywords.items()))
        return ["partial", *(_describe(v, seen) for v in (value.func, value.args, keywords))]
    if isinstance(value, types.FunctionType):
        return _describe_function(value, seen)
    if isinstance(value, types.ModuleType) and _is_known(value.__name__):
        return value.__name__
    if isinstance(value, (types.BuiltinFunctionType, type)) and _is_known(value.__module__):
        owner = getattr(value, "__self__", None)
        is_bound = not (owner is None or isinstance(owner, (type, types.ModuleType)))
        if not is_bound and value.__name__ not in _UNKNOWN_BUILTINS:
            return f"{value.__module__}.{value.__qualname__}"
    raise _UnknownError


def _describe_function(fn: types.FunctionType, seen: set[int]) -> Any:
    if id(fn) in seen:
        return fn.__qualname__
    seen.add(id(fn))
    try:
        closure = tuple(cell.cell_contents for cell in fn.__closure__ or ())
    except ValueError:  # a cell that is still empty
        raise _UnknownError from None
    captured = (fn.__defaults__, tuple(sorted((fn.__kwdefaults__ or {}).items())), closure)
    # Judge by the defining module: a wrapper may carry another function's name.
    package = fn.__globals__.get("__name__")
    code = fn.__code__.co_qualname if _is_known(package) else _describe_code(fn.__code__, fn, seen)
    return [package, code, _describe(captured, seen)]


def _describe_code(code: types.CodeType, fn: types.FunctionType, seen: set[int]) -> Any:
    parts: list[Any] = [code.co_code, code.co_exceptiontable, code.co_names, code.co_varnames]
    for constant in code.co_consts:
        is_code = isinstance(constant, types.CodeType)
        parts.append(_describe_code(constant, fn, seen) if is_code else _describe(constant, seen))
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = fn.__globals__.get(name, getattr(builtins, name, _UnknownError()))
            parts.append((name, _describe(value, seen)))
        elif operation == "IMPORT_NAME" or "GLOBAL" in operation:
            raise _UnknownError
    return parts


def _is_known(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in _KNOWN_PACKAGES
