"""`python -m benchmarks table FOLDER`: saved results as one Markdown table."""

import argparse
import json
from pathlib import Path

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "table", help="saved results as a Markdown table", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="folder of step-*.json files")
    parser.add_argument("--drop-rate", type=float, default=0.8, help="the rows to show")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    print("| model, resolution, batch | dense ms | sparse ms | speed-up | bound | efficiency |")
    print("|---|---|---|---|---|---|")
    for path in sorted(args.folder.glob("step-*.json")):
        rows = json.loads(path.read_text())["rows"]
        dense = next(row for row in rows if row["variant"] == "dense")
        for row in rows:
            if row["drop_rate"] == args.drop_rate:
                print(
                    f"| {row['model']} | {dense['median_ms']:.0f} | {row['median_ms']:.0f}"
                    f" | {row['speedup']:.2f} | {row['bound']:.2f} | {row['efficiency']:.2f} |"
                )
