"""Warn the user at the line of their own code that led to the warning."""

import sys
import warnings
from types import FrameType

from ssprop_passes.errors import NoEffectWarning

__all__ = ["warn_no_effect"]

_NOT_THE_USERS = ("ssprop_fx", "ssprop_passes", "torch")


def warn_no_effect(message: str) -> None:
    """Give a NoEffectWarning at the innermost frame outside torch and these packages."""
    level, frame = 1, sys._getframe()
    while _is_not_the_users(frame) and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, NoEffectWarning, stacklevel=level)


def _is_not_the_users(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).split(".")[0] in _NOT_THE_USERS
