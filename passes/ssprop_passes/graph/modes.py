"""Suspend the modes of a compilation.

While torch compiles, new tensors are fake and operators are recorded. Code that needs real tensors
or real runs, such as for state or timing, must suspend these modes.

Private torch: `_disable_current_modes`.
"""

from contextlib import AbstractContextManager
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["outside_modes"]


def outside_modes() -> AbstractContextManager[Any]:
    """Return a context in which tensors are real and nothing is recorded."""
    return _disable_current_modes()
