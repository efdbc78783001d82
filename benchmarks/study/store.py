"""The results of a grid: one JSONL file, one line per run."""

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Result", "append_result", "has_result", "read_results"]

Result = dict[str, Any]


def read_results(path: Path) -> list[Result]:
    """Return the results in a file; none if it does not exist.

    A process that is killed while writing leaves a partial line, which is skipped. If a run is in
    the file twice, the later line counts.

    Args:
        path: the JSONL file of a grid.
    """
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[result["task"], result["setting"], result["seed"]] = result
    return list(results.values())


def has_result(path: Path, task: str, setting: str, seed: int) -> bool:
    """Return whether a file has the result of a run."""
    wanted = (task, setting, seed)
    return any((r["task"], r["setting"], r["seed"]) == wanted for r in read_results(path))


def append_result(path: Path, result: Result) -> None:
    """Append a line to a file.

    Args:
        path: the JSONL file of a grid; it and its folder are created if missing.
        result: a result with at least "task", "setting" and "seed".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            # Start a new line after a partial one.
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(result).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
