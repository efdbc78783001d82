"""Logs: `SSPROP_LOG=info` shows what the compiler and its passes do, on stderr."""

import logging
import os
import sys
from collections.abc import Mapping

__all__ = ["VARIABLE", "configure_logging", "show_by_default"]

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


def show_by_default(logger: logging.Logger) -> None:
    """Show the INFO lines of a logger, unless the environment or the program says otherwise.

    They go to the program's own handlers and, if it has none, to stderr.

    Args:
        logger: a logger below `ssprop_fx`.
    """
    is_configured = logging.getLogger("ssprop_fx").level != logging.NOTSET
    if os.environ.get(VARIABLE, "").strip() or is_configured or logger.handlers:
        return
    logger.setLevel(logging.INFO)
    handler = _IfNoOther()
    handler.setFormatter(logging.Formatter("ssprop: %(message)s"))
    logger.addHandler(handler)


class _IfNoOther(logging.Handler):
    """Writes to stderr as long as the program has no handler of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and not logging.getLogger("ssprop_fx").handlers:
            print(self.format(record), file=sys.stderr)
