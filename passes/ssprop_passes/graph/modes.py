"""Leave the modes of a compilation for a moment.

While torch compiles, tensors that are made are fake, and operators are recorded. What is really to
be made or run, such as a state tensor or a timing, needs a way out.

Private torch: `_disable_current_modes`.
"""

from contextlib import AbstractContextManager
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["outside_modes"]


def outside_modes() -> AbstractContextManager[Any]:
    """Return a context in which tensors are real and nothing is recorded."""
    return _disable_current_modes()
