"""Rows of results: printed as a table, kept as JSON with the machine they come from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["read", "save", "table"]


def table(rows: Sequence[Any], formats: Mapping[str, str]) -> str:
    """Return rows as text, one line each below a line of the columns' names.

    Args:
        rows: dataclass instances.
        formats: field -> format specification, one entry a column.

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
    # Text to the left, numbers to the right.
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
    """Write rows and environment as `folder/name.json`.

    Args:
        rows: dataclass instances.
        environment: what `benchmarks.machine.environment` returned.
        folder: made if it is missing.
        name: name of the file, without extension.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    content = {"environment": dict(environment), "rows": [asdict(row) for row in rows]}
    (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that `save` wrote, as records."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows
