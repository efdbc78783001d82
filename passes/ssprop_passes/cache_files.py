"""Small JSON files next to Inductor's compile cache, written completely or not at all.

Private torch: the folder of that cache.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch._inductor.runtime.cache_dir_utils import cache_dir

__all__ = ["cache_file", "read_maybe", "write", "write_first"]


def cache_file(kind: str, key: str) -> Path:
    """Return the path of one file.

    Args:
        kind: the folder for files of one kind.
        key: a hash of everything that the content depends on.
    """
    return Path(cache_dir()) / kind / f"{key}.json"


def read_maybe(path: Path) -> Any:
    """Return the content; None if the file is missing or unreadable."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, content: Any) -> None:
    """Write the content; replace an existing file."""
    os.replace(_write_beside(path, content), path)


def write_first(path: Path, content: Any) -> Any:
    """Write the content unless another process was first; return the content of the file.

    Processes that measure at the same time must all decide alike, because each will find what
    another has compiled.
    """
    name = _write_beside(path, content)
    try:
        os.link(name, path)
    except OSError:
        known = read_maybe(path)
        if known is None:
            # The file there cannot be read, or the file system has no links.
            os.replace(name, path)
            return content
        content = known
    os.unlink(name)
    return content


def _write_beside(path: Path, content: Any) -> str:
    """Write the content to a new file in the same folder; return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(content, file)
    return file.name
