"""`python -m benchmarks export FOLDER`: CSV files and plots of saved results.

Each JSON file gets a CSV file of its rows. Files of `step`, `scaling` and `layer` also get a plot,
which needs matplotlib.
"""

import argparse
import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.picture import Record, draw_layers, draw_scaling, draw_steps
from benchmarks.results import read

__all__ = ["add_parser"]

_DRAW: dict[str, Callable[[Sequence[Record], Path], None]] = {
    "step": draw_steps,
    "scaling": draw_scaling,
    "layer": draw_layers,
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="CSV files and plots of saved results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of JSON files")
    parser.add_argument("--output", type=Path, help="folder for the files (default: FOLDER)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the files.

    Raises:
        ValueError: the folder has no JSON file.
    """
    paths = sorted(args.folder.glob("*.json"))
    if not paths:
        raise ValueError(f"{args.folder} has no JSON file")
    folder = args.output or args.folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        rows = read(path)
        with (folder / f"{path.stem}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
        draw = _DRAW.get(path.stem.split("-")[0])
        if draw:
            draw(rows, folder / f"{path.stem}.png")
