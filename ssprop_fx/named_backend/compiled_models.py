"""Models that `torch.compile` was called on, whether or not Dynamo has called the backend.

Torch tells a backend of a model only when Dynamo captures a graph of it. If Dynamo runs all of the
model eagerly, nothing but the wrapper that `torch.compile` has made shows that it was meant to be
compiled.

Private torch: that wrapper, `compile_wrapper` in `torch._dynamo.eval_frame`.
"""

import gc
from collections.abc import Iterator
from types import FrameType, FunctionType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["compiled_models", "model_in_maybe"]

_WRAPPER = "torch._dynamo.eval_frame", "compile_wrapper"


def model_in_maybe(frame: FrameType) -> nn.Module | None:
    """Return the model that a frame of the wrapper calls; None for any other frame."""
    if (frame.f_globals.get("__name__"), frame.f_code.co_name) != _WRAPPER:
        return None
    return _module_maybe(frame.f_locals["fn"])


def compiled_models(backend: str) -> Iterator[nn.Module]:
    """Yield the models that `torch.compile` was called on with a backend.

    This looks through all objects of the process, which takes a tenth of a second.

    Args:
        backend: the backend's name.
    """
    for found in gc.get_objects():
        if type(found) is not FunctionType or found.__code__.co_name != _WRAPPER[1]:
            continue
        if found.__globals__.get("__name__") != _WRAPPER[0]:
            continue
        names, cells = found.__code__.co_freevars, found.__closure__ or ()
        held = dict(zip(names, cells, strict=True))
        model = _module_maybe(held["fn"].cell_contents)
        if model is not None and _backend_name(held["callback"].cell_contents) == backend:
            yield model


def _backend_name(callback: Any) -> object:
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return getattr(callback, "compiler_name", None)


def _module_maybe(fn: Any) -> nn.Module | None:
    """Return the module that a compiled function is or belongs to; None if there is none."""
    while fn is not None:
        for module in (fn, getattr(fn, "__self__", None)):
            if isinstance(module, nn.Module):
                # DistributedDataParallel's `forward` only calls the model, and hides its kind.
                return module.module if isinstance(module, DistributedDataParallel) else module
        fn = getattr(fn, "__wrapped__", None)
    return None
