"""CPU kernels in C++: each is a file in this folder, compiled when first needed or ahead.

Private torch: `CppCodeCache`, which knows the compiler, its flags and the output folder.
"""

import ctypes
import warnings
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import cache
from pathlib import Path
from threading import Thread

__all__ = ["COUNT", "POINTER", "kernel_maybe", "start_compiling"]

_FOLDER = Path(__file__).parent

POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64


@cache
def kernel_maybe(name: str, *arguments: type) -> Callable[..., None] | None:
    """Return a C++ function; None, after a warning, if it does not compile.

    Args:
        name: name of the function, and of its file.
        arguments: type of each argument, `POINTER` or `COUNT`.
    """
    try:
        return ctypes.CFUNCTYPE(None, *arguments)((name, _library(name)))
    except Exception as error:
        warnings.warn(
            f"the kernel {name} does not compile, so slower ATen kernels run instead: {error}",
            stacklevel=2,
        )
        return None


@cache
def start_compiling() -> Thread:
    """Compile all kernels on a thread, once per process; return the thread.

    Meanwhile `kernel_maybe` waits for the kernel it needs. It also reports the errors, which the
    thread ignores.
    """
    # Inductor's settings, which include compiler flags, belong to the context.
    thread = Thread(target=copy_context().run, args=[_compile_all], name="ssprop kernels")
    thread.start()
    return thread


def _compile_all() -> None:
    for file in sorted(_FOLDER.glob("*.cpp")):
        with suppress(Exception):
            _library(file.stem)


def _library(name: str) -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = CppCodeCache.load((_FOLDER / f"{name}.cpp").read_text())
    return library
