"""`python -m benchmarks table FOLDER`: saved results of `step` as Markdown tables.

For channels, one row for each model and sparse variant, one column for each measured peer. For
samples, one row for each model and variant, one column for each drop rate; the other columns are
at the highest drop rate. For results of `gpu`, one row for each model, variant and drop rate. All
speed-ups are over dense torch.compile.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.picture import sparse_rows
from benchmarks.results import read
from benchmarks.variants import DENSE, DENSE_PEERS, PEERS

__all__ = ["add_parser", "gpu_markdown", "join", "markdown", "samples_markdown"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "table", help="saved results as Markdown tables", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="folder of results of `step` or of `gpu`")
    parser.add_argument("--drop-rate", type=float, default=0.8, help="drop rate of the channels")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    channels, samples, gpu = (
        [read(path) for path in sorted(args.folder.glob(f"{kind}-*.json"))]
        for kind in ("step", "samples", "gpu")
    )
    tables = [markdown(channels, args.drop_rate)] if channels else []
    tables += [samples_markdown(samples)] if samples else []
    tables += [gpu_markdown(gpu)] if gpu else []
    print("\n\n".join(tables))


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
    return join(lines)


def samples_markdown(files: list[list[dict[str, Any]]]) -> str:
    """Return the table of `step --axis sample`.

    Args:
        files: the rows of each file, records of SampleRow.
    """
    rates = sorted({row["drop_rate"] for rows in files for row in rows if row["drop_rate"]})
    columns = ["model, resolution, batch", "variant", *(f"{rate:g}" for rate in rates)]
    columns += ["forward ms", "backward ms", "peak MiB"]
    lines = [columns, ["---"] * len(columns)]
    for rows in files:
        bounds = {row["drop_rate"]: row["bound"] for row in rows}
        for name in dict.fromkeys(row["variant"] for row in rows):
            by_rate = {row["drop_rate"]: row for row in rows if row["variant"] == name}
            speedups = {rate: row["speedup"] for rate, row in by_rate.items()}
            last = by_rate[max(by_rate)]
            if name != DENSE and not last["drop_rate"]:
                # Another dense step is as fast at every rate.
                speedups = dict.fromkeys(rates, last["speedup"])
            figures = [f"{last[f]:.0f}" for f in ("forward_ms", "backward_ms", "peak_mib")]
            lines.append([last["model"], name, *_figures(speedups, rates), *figures])
            if name == DENSE:
                lines.append([last["model"], "bound", *_figures(bounds, rates), "", "", ""])
    return join(lines)


def gpu_markdown(files: list[list[dict[str, Any]]]) -> str:
    """Return the table of `gpu`.

    Args:
        files: the rows of each file; only records of GpuRow are shown.
    """
    columns = ["model, resolution, batch", "variant", "mode", "drop rate", "forward ms"]
    columns += ["backward ms", "step ms", "speed-up", "bound", "share", "peak MiB", "waits"]
    lines = [columns, ["---"] * len(columns)]
    for row in (row for rows in files for row in rows if "forward_ms" in row):
        texts = [row["model"], row["variant"], row["mode"], f"{row['drop_rate']:g}"]
        times = [f"{row[f]:.1f}" for f in ("forward_ms", "backward_ms", "step_ms")]
        ratios = [f"{row[f]:.2f}" for f in ("speedup", "bound", "share")]
        lines.append([*texts, *times, *ratios, f"{row['peak_mib']:.0f}", str(row["waits"])])
    return join(lines)


def _figures(by_rate: dict[float, float], rates: list[float]) -> list[str]:
    return [f"{by_rate[rate]:.2f}" if rate in by_rate else "" for rate in rates]


def join(lines: list[list[str]]) -> str:
    """Return lines of cells as a Markdown table; the second line is that of dashes."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_shown(row: dict[str, Any], drop_rate: float) -> bool:
    """Return whether a row has the drop rate or is dense."""
    return row["drop_rate"] == drop_rate or row["variant"] in (DENSE, *DENSE_PEERS)
