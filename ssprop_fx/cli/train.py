"""`ssprop-fx train`: train any timm model with scheduled sparse back-propagation."""

import argparse
import functools
import textwrap
from pathlib import Path
from typing import Any

from ssprop_fx.cli.flags import add_flags
from ssprop_fx.options import options_of
from ssprop_fx.scheduling.parse import EXAMPLES
from ssprop_fx.training.augmentation import Augmentation
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError, needs_train_extra
from ssprop_fx.training.settings import GROUPS

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Train an image classifier of timm with scheduled sparse back-propagation.

Without --data-dir it trains on scikit-learn's handwritten digits, which need no download.
A run keeps last.pt, best.pt, config.yaml, summary.csv, steps.csv, sites.txt and plot.png in its
folder; `ssprop-fx report` compares runs."""

_EPILOG = f"""\
Schedules are written name:key=value,key=value; 10ep means the steps of 10 epochs:
  {"; ".join(EXAMPLES.values())}

Keys of --aug-kwargs, with timm's names; docs/configuration.md explains them:
{textwrap.indent(textwrap.fill(", ".join(options_of(Augmentation)), 96), "  ")}

Ctrl-C ends the run after the current step. --resume continues there, with the same batches and the
same random numbers, and needs no other flag. After a crash it continues from the last checkpoint;
--checkpoint-every writes more of them. A last step of an epoch that is smaller than the others is
left out, because another batch size would compile the model again.

Several processes, each with --batch-size images:
  torchrun --nproc_per_node 2 -m ssprop_fx.cli train ...

Step times do not count loading, nor the first two steps of each phase (dense, sparse), which
compile. On a CPU the process keeps the memory that it frees, which makes steps faster.
"""

# Flags that are no setting of a run.
_COMMAND = {"command", "run", "config", "resume", "changed_data"}


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
    for settings in GROUPS:
        group = parser.add_argument_group(settings.title)
        add_flags(group, options_of(settings))
    group.add_argument(
        "--config",
        metavar="FILE",
        help="Read settings from this YAML file, such as a run's config.yaml; flags win over it",
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="Continue this run, a folder or checkpoint (default: that of --experiment, or the"
        " newest in --output)",
    )
    group.add_argument(
        "--changed-data",
        action="store_true",
        help="Let --resume go on though images were added or removed; an epoch keeps its number"
        " of steps",
    )
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
        from_file = parser.parse_args(read_arguments(given["config"]))
        given = {**vars(from_file), **given}
    settings = {name: value for name, value in given.items() if name not in _COMMAND}
    if "resume" not in given:
        if "changed_data" in given:
            raise CommandError("--changed-data is for --resume; a new run takes the data as it is")
        return train(TrainConfig.from_settings(settings))
    output = settings.get("output", TrainConfig.output)
    path = find_checkpoint(given["resume"], output, settings.get("experiment"))
    checkpoint = load_checkpoint(path)
    config = TrainConfig.resumed(checkpoint["config"], settings)
    return train(
        config,
        folder=Path(path).parent,
        checkpoint=checkpoint,
        changed_data="changed_data" in given,
    )
