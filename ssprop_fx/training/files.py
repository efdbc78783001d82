"""Atomic file writes: a file is either complete or absent."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["remove_leftovers", "replace_file"]

_SUFFIX = ".partial"


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: after a failure the old file is still there.

    Args:
        path: the file.
        write: writes the content to the open file that it gets.

    Raises:
        OSError: the folder cannot be written to.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp lets only the owner read; give the file the usual permissions of the umask.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files of a process that was killed while writing.

    Args:
        folder: a folder that no other process writes to.
    """
    for path in folder.glob(f".*{_SUFFIX}"):
        path.unlink()
