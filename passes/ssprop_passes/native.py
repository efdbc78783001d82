"""Kernels for a CPU in C++, each a file beside this one, compiled on first use.

Private torch: `CppCodeCache`, which knows the compiler, its flags and the folder for what it makes.
"""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

__all__ = ["COUNT", "POINTER", "kernel_maybe"]

POINTER, COUNT = ctypes.c_void_p, ctypes.c_int64


@cache
def kernel_maybe(name: str, *arguments: type) -> Callable[..., None] | None:
    """Return a function of C++, None, after a warning, where it does not compile.

    Args:
        name: of the function, and of its file.
        arguments: type of each, `POINTER` or `COUNT`.
    """
    from torch._inductor.codecache import CppCodeCache

    source = (Path(__file__).parent / f"{name}.cpp").read_text()
    try:
        return ctypes.CFUNCTYPE(None, *arguments)((name, CppCodeCache.load(source)))
    except Exception as error:
        warnings.warn(
            f"the kernel {name} does not compile, and ATen's slower ones are used: {error}",
            stacklevel=2,
        )
        return None
