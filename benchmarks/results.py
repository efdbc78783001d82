"""Rows of results: printed as a table, kept as CSV and JSON with the machine they come from."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

__all__ = ["save", "table"]


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
) -> Path:
    """Write rows as `folder/name.csv` and, with the environment, as `folder/name.json`.

    Args:
        rows: dataclass instances, at least one.
        environment: what `benchmarks.machine.environment` returned.
        folder: made if it is missing.
        name: name of the files, without extension.

    Returns:
        Path of a picture of the same rows, `folder/name.png`, for the caller to draw.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) for row in rows]
    with (path / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
    content = {"environment": dict(environment), "rows": records}
    (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return path / f"{name}.png"
