"""`python -m benchmarks memory FOLDER`: tables and a picture of what `saved` measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import join
from benchmarks.picture import Record, figure_maybe
from benchmarks.results import read
from benchmarks.variants import DENSE

__all__ = ["add_parser", "bytes_markdown", "draw", "saved_markdown"]

# What the picture marks as reached: memory and time, as shares of dense.
_MEMORY, _TIME = 0.6, 1.1

_COLORS = {
    DENSE: "#4c566a",
    "budget": "#2e7d6b",
    "checkpoint": "#5e81ac",
    "two passes": "#d08770",
    "bf16": "#b48ead",
    "pruned": "#bf616a",
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "memory", help="results of `saved` as Markdown tables and a picture", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="folder of results of `saved`")
    parser.add_argument("--picture", type=Path, help="a PNG file to draw, with matplotlib")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the tables and draw the picture.

    Raises:
        ValueError: the folder has no result of `saved`.
    """
    saved, counted = (
        [read(path) for path in sorted(args.folder.glob(f"{kind}-*.json"))]
        for kind in ("saved", "bytes")
    )
    if not saved:
        raise ValueError(f"{args.folder} has no result of `saved`")
    tables = [saved_markdown(saved)] + ([bytes_markdown(counted)] if counted else [])
    print("\n\n".join(tables))
    if args.picture:
        draw(saved, args.picture)


def saved_markdown(files: Sequence[Sequence[Record]]) -> str:
    """Return the table of methods.

    Args:
        files: the rows of each file, records of SavedRow.
    """
    columns = ["model, resolution, batch", "method", "setting", "step ms", "time", "peak MiB"]
    lines = [[*columns, "memory", "error"]]
    for row in (row for rows in files for row in rows):
        texts = [row["model"], row["method"], row["setting"], f"{row['step_ms']:.0f}"]
        interval = f"{row['time']:.2f} ({row['time_low']:.2f} to {row['time_high']:.2f})"
        figures = [f"{row['peak_mib']:.0f}", f"{row['memory']:.2f}", f"{row['error']:.0e}"]
        is_dense = row["method"] == DENSE
        lines.append([*texts, "1" if is_dense else interval, *figures])
    return join([lines[0], ["---"] * len(lines[0]), *lines[1:]])


def bytes_markdown(files: Sequence[Sequence[Record]]) -> str:
    """Return the table of what is saved.

    Args:
        files: the rows of each file, records of BytesRow.
    """
    columns = ["model, resolution, batch", "budget", "saved MiB", "pruned MiB"]
    lines = [[*columns, "without weight gradients MiB"], ["---"] * 5]
    for row in (row for rows in files for row in rows):
        figures = [f"{row[field]:.0f}" for field in ("saved_mib", "pruned_mib", "without_mib")]
        lines.append([row["model"], f"{row['budget']:g}", *figures])
    return join(lines)


def draw(files: Sequence[Sequence[Record]], path: Path) -> None:
    """Plot memory over time, both as shares of dense, a panel for each model.

    Thin lines mark six tenths of the memory and 1.1 times the time.

    Args:
        files: the rows of each file, records of SavedRow.
        path: the PNG file; an existing file is replaced.
    """
    figure = figure_maybe(4 * len(files), 4.2)
    if figure is None:
        return
    panels = figure.subplots(1, len(files), squeeze=False, sharey=True)[0]
    for axes, rows in zip(panels, files, strict=True):
        axes.axhline(_MEMORY, color="#d8dee9", linewidth=1)
        axes.axvline(_TIME, color="#d8dee9", linewidth=1)
        for method, color in _COLORS.items():
            points = [row for row in rows if row["method"] == method]
            points.sort(key=lambda row: -float(row["memory"]))
            times = [row["time"] for row in points]
            shares = [row["memory"] for row in points]
            axes.plot(times, shares, "o-", color=color, label=method, linewidth=1, markersize=5)
            for row in points:
                at = row["time"], row["memory"]
                style = {"textcoords": "offset points", "fontsize": 7, "color": color}
                axes.annotate(row["setting"], at, (4, 3), **style)
        axes.set_title(rows[0]["model"], fontsize=8)
        axes.set_xlabel("step time, dense = 1", fontsize=8)
        axes.set_ylim(0, 1.08)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("peak memory, dense = 1", fontsize=8)
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=130)
