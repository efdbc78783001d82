"""Rows of results: print them as a table, save them as JSON with their machine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["read", "save", "table"]


def table(rows: Sequence[Any], formats: Mapping[str, str]) -> str:
    """Return rows as text: a line of column names, then one line per row.

    Args:
        rows: dataclass instances.
        formats: field -> format specification, one entry per column.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Row:
        ...     variant: str
        ...     ms: float
        >>> print(table([Row("dense", 1.5), Row("sparse", 12)], {"variant": "", "ms": ".1f"}))
        variant    ms
        dense     1.5
        sparse   12.0
    """
    lines = [list(formats)]
    lines += [
        [format(getattr(row, field), spec) for field, spec in formats.items()] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # Align text left and numbers right.
    is_text = [not rows or isinstance(getattr(rows[0], field), str) for field in formats]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text, strict=True)
        ).rstrip()
        for line in lines
    )


def save(
    rows: Sequence[Any], environment: Mapping[str, str | int], folder: str | Path, name: str
) -> None:
    """Write rows and environment as `folder/name.json`, whole or not at all.

    Args:
        rows: dataclass instances.
        environment: the result of `benchmarks.machine.environment`.
        folder: folder of the file, created if missing.
        name: name of the file, without extension.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    content = {"environment": dict(environment), "rows": [asdict(row) for row in rows]}
    # A process that is killed while it writes leaves the file as it was.
    partial = path / f"{name}.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path / f"{name}.json")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of `save`, as records."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows
