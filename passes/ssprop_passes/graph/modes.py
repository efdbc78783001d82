"""Modes in which torch does more than to compute: suspend those of a compilation, name the others.

While torch compiles, new tensors are fake and operators are recorded. Code that needs real tensors
or real runs, such as for state or timing, must suspend these modes.

Private torch: `_disable_current_modes`, the proxy mode, functorch's stack of transforms.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["is_traced", "is_transformed", "outside_modes"]


def outside_modes() -> AbstractContextManager[Any]:
    """Return a context in which tensors are real and nothing is recorded."""
    return _disable_current_modes()


def is_traced(args: tuple[Any, ...]) -> bool:
    """Return whether a call is recorded: by torch.export, make_fx, torch.fx or torch.jit.

    Args:
        args: the arguments of the call.
    """
    return (
        torch.compiler.is_exporting()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or get_proxy_mode() is not None
        or any(isinstance(arg, torch.fx.Proxy) for arg in args)
    )


def is_transformed() -> bool:
    """Return whether a transform of torch.func, such as `grad` or `vmap`, is in force."""
    return torch._C._functorch.peek_interpreter_stack() is not None
