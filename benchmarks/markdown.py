"""`python -m benchmarks table FOLDER`: saved results of `step` as one Markdown table.

One row for each model and sparse variant, one column for each measured peer. All speed-ups are over
dense torch.compile.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.picture import sparse_rows
from benchmarks.results import read
from benchmarks.variants import DENSE, DENSE_PEERS, PEERS

__all__ = ["add_parser", "markdown"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "table", help="saved results as a Markdown table", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="folder of step-*.json files")
    parser.add_argument("--drop-rate", type=float, default=0.8, help="drop rate of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    files = [read(path) for path in sorted(args.folder.glob("step-*.json"))]
    print(markdown(files, args.drop_rate))


def markdown(files: list[list[dict[str, Any]]], drop_rate: float) -> str:
    """Return the table.

    Args:
        files: the rows of each file, records of StepRow.
        drop_rate: drop rate of the rows to show.
    """
    shown = [[row for row in rows if _is_shown(row, drop_rate)] for rows in files]
    peers = [
        name for name in PEERS if any(row["variant"] == name for rows in shown for row in rows)
    ]
    variants = any(len(sparse_rows(rows)) > 1 for rows in shown)
    columns = ["model, resolution, batch", *["variant"] * variants]
    columns += ["dense ms", "sparse ms", "speed-up", "bound", "efficiency", *peers]
    lines = [columns, ["---"] * len(columns)]
    for rows in shown:
        by_name = {row["variant"]: row for row in rows}
        speed_of_peers = [f"{by_name[n]['speedup']:.2f}" if n in by_name else "" for n in peers]
        for row in sparse_rows(rows):
            lines.append(
                [
                    row["model"],
                    *[row["variant"]] * variants,
                    f"{by_name[DENSE]['median_ms']:.0f}",
                    f"{row['median_ms']:.0f}",
                    *(f"{row[field]:.2f}" for field in ("speedup", "bound", "efficiency")),
                    *speed_of_peers,
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_shown(row: dict[str, Any], drop_rate: float) -> bool:
    """Return whether a row has the drop rate or is dense."""
    return row["drop_rate"] == drop_rate or row["variant"] in (DENSE, *DENSE_PEERS)
