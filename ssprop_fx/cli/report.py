"""`ssprop-fx report`: compare runs of `ssprop-fx train`."""

import argparse
from pathlib import Path
from typing import Any

from ssprop_fx.training.errors import CommandError, needs_train_extra

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Compare runs: accuracy over steps, seconds and joules, drop rate, and savings.

Writes report.png and report.html, a page that needs no other file."""


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the parser of `report`.

    Args:
        subparsers: the result of `ArgumentParser.add_subparsers`.
    """
    parser = subparsers.add_parser(
        "report",
        help="compare runs of train",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        type=Path,
        help="the run to compare the others with (default: the first dense one)",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="folder for report.png and report.html (default: the current one)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `report`.

    Args:
        args: parsed arguments.

    Returns:
        Exit status.

    Raises:
        CommandError: a folder holds no run, the report cannot be written, or a package of the
            extra `train` is missing.
    """
    with needs_train_extra():
        from ssprop_fx.training.compare.comparison import compare_runs
        from ssprop_fx.training.compare.page import format_page, format_text
        from ssprop_fx.training.compare.plot import draw_comparison
        from ssprop_fx.training.files import replace_file
    comparison = compare_runs(args.runs, args.baseline)
    picture = draw_comparison(comparison)
    page = format_page(comparison, picture)
    output: Path = args.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        replace_file(output / "report.png", lambda file: file.write(picture))
        replace_file(output / "report.html", lambda file: file.write(page.encode()))
    except OSError as error:
        raise CommandError(f"--output {output}: {error.strerror or error}") from error
    print(format_text(comparison))
    print(f"\n{output / 'report.html'}")
    return 0
