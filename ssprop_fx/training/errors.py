"""CommandError: a user's mistake, in one line."""

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence

__all__ = [
    "CommandError",
    "UnreadableError",
    "first_line",
    "flag_error",
    "needs_train_extra",
    "unknown_name",
]


class CommandError(Exception):
    """A mistake that the user can fix; the message is one line without a traceback.

    Args:
        message: what is wrong and how to fix it.
        exit_code: exit status of the command; 2 is a usage error.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


class UnreadableError(CommandError):
    """Images that cannot be read, which ends a run.

    Args:
        message: which images; torch passes on that of a loader worker with a traceback before it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2], exit_code=1)


def flag_error(error: Exception) -> CommandError:
    """Return the error of a flag, given that of the argument which the message begins with."""
    name = re.match(r"\w*", str(error))
    length = name.end() if name else 0
    return CommandError(f"--{str(error)[:length].replace('_', '-')}{str(error)[length:]}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def unknown_name(flag: str, name: str, known: Sequence[str]) -> CommandError:
    """Return the error for a name that timm does not know, with similar names as a hint.

    Args:
        flag: the flag that the user gave the name to.
        name: the name.
        known: all known names.
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(close)}?" if close else "timm has no similar name"
    return CommandError(f"{flag} {name}: unknown; {hint}")


@contextlib.contextmanager
def needs_train_extra() -> Iterator[None]:
    """Context in which a command imports packages of the extra `train`.

    Raises:
        CommandError: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ssprop"):
            raise
        raise CommandError(
            f"the package {error.name} is missing: pip install ssprop-fx[train]"
        ) from error
