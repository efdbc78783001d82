"""The parser of `ssprop-fx`, and how its errors reach the user."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import ssprop_fx
from ssprop_fx.cli import inspect, report, train
from ssprop_fx.training.errors import CommandError

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others of this command."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ssprop-fx`.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 1 for a model that cannot be inspected, 2 for a mistake of the user's,
        130 for Ctrl-C.
    """
    parser = _Parser(prog="ssprop-fx", description=ssprop_fx.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {ssprop_fx.__version__}")
    subparsers = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    train.add_parser(subparsers)
    inspect.add_parser(subparsers)
    report.add_parser(subparsers)
    try:
        args = parser.parse_args(argv)
        status: int = args.run(args)
    except CommandError as error:
        # Of the processes that torchrun starts one is enough to say it.
        if os.environ.get("RANK", "0") == "0":
            print(f"ssprop-fx: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ssprop-fx: interrupted", file=sys.stderr)
        return 130
    return status
