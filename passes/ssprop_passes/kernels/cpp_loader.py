"""Kernels for a CPU in C++, each a file beside this one, compiled when first needed or ahead.

Private torch: `CppCodeCache`, which knows the compiler, its flags and the folder for what it makes.
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
    """Return a function of C++, None, after a warning, where it does not compile.

    Args:
        name: of the function, and of its file.
        arguments: type of each, `POINTER` or `COUNT`.
    """
    try:
        return ctypes.CFUNCTYPE(None, *arguments)((name, _library(name)))
    except Exception as error:
        warnings.warn(
            f"the kernel {name} does not compile, and ATen's slower ones are used: {error}",
            stacklevel=2,
        )
        return None


@cache
def start_compiling() -> Thread:
    """Compile all kernels on a thread, once in a process; return the thread.

    While it runs, `kernel_maybe` waits for the kernel that it is asked for. Errors are left to it.
    """
    # Inductor's settings, and with them flags of the compiler, are the context's.
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
