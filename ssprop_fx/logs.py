"""Logs: `SSPROP_LOG=info` shows what the compiler and its passes do, on stderr."""

import logging
from collections.abc import Mapping

__all__ = ["VARIABLE", "configure_logging"]

VARIABLE = "SSPROP_LOG"
_LEVELS = ("debug", "info", "warning", "error")


def configure_logging(environ: Mapping[str, str]) -> None:
    """Set the level of the loggers `ssprop_fx` and `ssprop_passes` from the environment.

    Without the variable they are ordinary loggers, which the program may configure.

    Args:
        environ: the environment; `SSPROP_LOG` is debug, info, warning or error.

    Raises:
        ValueError: the variable has another value.

    Examples:
        >>> configure_logging({"SSPROP_LOG": "loud"})
        Traceback (most recent call last):
        ValueError: SSPROP_LOG must be one of debug, info, warning, error, got 'loud'
    """
    level = environ.get(VARIABLE, "").strip().lower()
    if not level:
        return
    if level not in _LEVELS:
        raise ValueError(
            f"{VARIABLE} must be one of {', '.join(_LEVELS)}, got {environ[VARIABLE]!r}"
        )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    for name in ("ssprop_fx", "ssprop_passes"):
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        logger.addHandler(handler)
        logger.propagate = False
