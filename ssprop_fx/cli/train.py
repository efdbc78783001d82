"""`ssprop-fx train`: train any timm model with scheduled sparse back-propagation."""

import argparse
import functools
from dataclasses import fields
from pathlib import Path
from typing import Any

from ssprop_fx.cli.train_flags import add_flags
from ssprop_fx.scheduling.parse import EXAMPLES
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import needs_train_extra

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Train an image classifier of timm with scheduled sparse back-propagation.

Without --data-dir it trains on scikit-learn's handwritten digits, which need no download.
A run keeps last.pt, best.pt, config.yaml, summary.csv, steps.csv, sites.txt and plot.png in its
folder; `ssprop-fx report` compares runs."""

_EPILOG = f"""\
Schedules are written name:key=value,key=value; 10ep stands for the steps of 10 epochs:
  {"; ".join(EXAMPLES.values())}

Ctrl-C ends the run after the step in progress. --resume continues there, with the same batches
and the same random numbers, and needs no other flag; after a crash it continues from the last
checkpoint, which --checkpoint-every makes more often than once an epoch. Steps that are smaller
than the others, at the end of an epoch, are left out: another size would compile the model again.

Several processes, each with --batch-size images:
  torchrun --nproc_per_node 2 -m ssprop_fx.cli train ...

Step times leave out loading, and the first two steps of each phase (dense, sparse), which compile.
On a CPU the process keeps the memory that it frees: paging it in anew costs time in each step.
"""

# Flags that are no setting of a run.
_COMMAND = {"command", "run", "config", "resume"}


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the parser of `train`.

    Args:
        subparsers: what `ArgumentParser.add_subparsers` returned.
    """
    parser = subparsers.add_parser(
        "train",
        help="train a timm model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # Only what the command line names is in the result: TrainConfig has the defaults, and a
        # resumed run takes the rest from its checkpoint.
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser)
    parser.set_defaults(run=functools.partial(run, parser=parser))


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run `train`.

    Args:
        args: parsed arguments.
        parser: what parses those of a file as well.

    Returns:
        Exit status.

    Raises:
        CommandError: a flag is wrong, or a package of the extra `train` is missing.
    """
    with needs_train_extra():
        from ssprop_fx.training.checkpoint import find_checkpoint, load_checkpoint
        from ssprop_fx.training.config_file import read_arguments
        from ssprop_fx.training.run import train

    given = vars(args)
    if "config" in given:
        known = {field.name for field in fields(TrainConfig)}
        from_file = parser.parse_args(read_arguments(given["config"], known))
        given = {**vars(from_file), **given}
    settings = {name: value for name, value in given.items() if name not in _COMMAND}
    if "resume" not in given:
        return train(TrainConfig(**settings))
    output = settings.get("output", TrainConfig.output)
    path = find_checkpoint(given["resume"], output, settings.get("experiment"))
    checkpoint = load_checkpoint(path)
    config = TrainConfig.resumed(checkpoint["config"], settings)
    return train(config, folder=Path(path).parent, checkpoint=checkpoint)
