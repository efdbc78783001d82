"""`ssprop-fx train`: train any timm model with scheduled sparse back-propagation."""

import argparse
from pathlib import Path
from typing import Any

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.schedule_spec import EXAMPLES

__all__ = ["add_parser", "run"]

_DESCRIPTION = """\
Train an image classifier of timm with scheduled sparse back-propagation.

Without --data-dir it trains on scikit-learn's handwritten digits, which need no download.
A run keeps last.pt, best.pt, summary.csv, steps.csv, sites.txt and plot.png in its folder."""

_EPILOG = f"""\
Schedules are written name:key=value,key=value; 10ep stands for the steps of 10 epochs:
  {"; ".join(EXAMPLES.values())}

Ctrl-C ends the run after the step in progress. --resume continues there, with the same batches
and the same random numbers, and needs no other flag. The last training batch of an epoch is left
out if it is smaller than the others: another size would compile the model again.

Step times leave out loading, and the first two steps of each phase (dense, sparse), which compile.
On a CPU the process keeps the memory that it frees: paging it in anew costs time in each step.
"""


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
    parser.set_defaults(run=run)
    _add_data_flags(parser.add_argument_group("data"))
    _add_model_flags(parser.add_argument_group("model"))
    _add_sparsity_flags(parser.add_argument_group("sparse back-propagation"))
    _add_optimizer_flags(parser.add_argument_group("optimizer"))
    _add_run_flags(parser.add_argument_group("run"))


def run(args: argparse.Namespace) -> int:
    """Run `train`.

    Args:
        args: parsed arguments.

    Returns:
        Exit status.

    Raises:
        CommandError: a flag is wrong, or a package of the extra `train` is missing.
    """
    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    try:
        # Imported here, so that other commands and --help work without the extra.
        from ssprop_fx.training.checkpoint import find_checkpoint, load_checkpoint
        from ssprop_fx.training.run import train
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ssprop"):
            raise
        raise CommandError(
            f"the package {error.name} is missing: pip install ssprop-fx[train]"
        ) from error

    if "resume" not in given:
        return train(TrainConfig(**given))
    resume = given.pop("resume")
    path = find_checkpoint(resume, given.get("output", TrainConfig.output), given.get("experiment"))
    checkpoint = load_checkpoint(path)
    config = TrainConfig.resumed(checkpoint["config"], given)
    return train(config, folder=Path(path).parent, checkpoint=checkpoint)


def _add_data_flags(group: Any) -> None:
    group.add_argument(
        "--data-dir", metavar="DIR", help="folder with one folder a split, one a class in each"
    )
    group.add_argument(
        "--train-split", metavar="NAME", help=_help("train_split", "folder of training images")
    )
    group.add_argument(
        "--val-split",
        metavar="NAME",
        help=_help("val_split", "folder of validation images; val or test will do as well"),
    )
    group.add_argument(
        "--img-size",
        type=int,
        metavar="N",
        help="height and width in pixels (default: the model's; digits: 64)",
    )
    group.add_argument("--mean", type=float, nargs="+", action=_Tuple, help="of each channel")
    group.add_argument("--std", type=float, nargs="+", action=_Tuple, help="of each channel")
    group.add_argument(
        "-b",
        "--batch-size",
        type=int,
        metavar="N",
        help=_help("batch_size", "images in a training step"),
    )
    group.add_argument(
        "-vb",
        "--validation-batch-size",
        type=int,
        metavar="N",
        help="images in a validation step (default: --batch-size)",
    )
    group.add_argument(
        "-j",
        "--workers",
        type=int,
        metavar="N",
        help=_help("workers", "loader processes, 0 for none"),
    )
    group.add_argument(
        "--aug", action=argparse.BooleanOptionalAction, help=_help("aug", "augment training images")
    )
    group.add_argument(
        "--scale", type=float, nargs=2, action=_Tuple, help="area of random crops, as fractions"
    )
    group.add_argument(
        "--ratio", type=float, nargs=2, action=_Tuple, help="aspect ratio of random crops"
    )
    group.add_argument("--hflip", type=float, metavar="P", help="probability of a mirror image")
    group.add_argument("--color-jitter", type=float, metavar="X", help="strength")
    group.add_argument("--aa", metavar="POLICY", help="AutoAugment, such as rand-m9-mstd0.5")


def _add_model_flags(group: Any) -> None:
    group.add_argument("--model", metavar="NAME", help=_help("model", "model of timm"))
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        help=_help("pretrained", "begin with timm's weights"),
    )
    group.add_argument(
        "--num-classes", type=int, metavar="N", help="classes (default: the dataset's)"
    )
    group.add_argument("--drop-path", type=float, metavar="P", help="drop path probability")
    group.add_argument(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help=_help("channels_last", "channels-last memory layout, the fast one for convolutions"),
    )


def _add_sparsity_flags(group: Any) -> None:
    group.add_argument(
        "--schedule",
        metavar="TEXT",
        help=_help("schedule", "drop rate over the run, or none; see below"),
    )
    group.add_argument(
        "--sparsity-warmup-epochs",
        type=int,
        metavar="N",
        help=_help("sparsity_warmup_epochs", "dense epochs before the schedule begins"),
    )
    group.add_argument(
        "--channel-multiple",
        type=int,
        metavar="N",
        help="round keep counts to multiples of N (default: 16 on a CPU, 8 elsewhere)",
    )
    group.add_argument(
        "--min-channels",
        type=int,
        metavar="N",
        help=_help("min_channels", "smaller layers stay dense"),
    )
    group.add_argument(
        "--compile-backend",
        choices=["inductor", "aot_eager"],
        help=_help("compile_backend", "torch.compile backend"),
    )
    group.add_argument(
        "--compile-mode",
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        help="torch.compile mode, with the Inductor backend",
    )


def _add_optimizer_flags(group: Any) -> None:
    group.add_argument("--epochs", type=int, metavar="N", help=_help("epochs", "epochs"))
    group.add_argument("--max-steps", type=int, metavar="N", help="end the run after N steps")
    group.add_argument("--opt", metavar="NAME", help=_help("opt", "optimizer of timm"))
    group.add_argument("--lr", type=float, help=_help("lr", "learning rate"))
    group.add_argument("--momentum", type=float, metavar="M", help=_help("momentum", "momentum"))
    group.add_argument(
        "--weight-decay", type=float, metavar="W", help=_help("weight_decay", "weight decay")
    )
    group.add_argument(
        "--sched",
        choices=["cosine", "tanh", "step", "none"],
        help=_help("sched", "learning rate schedule, stepped at each update"),
    )
    group.add_argument(
        "--warmup-epochs", type=int, metavar="N", help=_help("warmup_epochs", "LR warm-up epochs")
    )
    group.add_argument(
        "--warmup-lr", type=float, metavar="LR", help=_help("warmup_lr", "LR it begins with")
    )
    group.add_argument("--min-lr", type=float, metavar="LR", help=_help("min_lr", "LR at the end"))
    group.add_argument(
        "--decay-epochs",
        type=float,
        metavar="N",
        help=_help("decay_epochs", "epochs between steps of --sched step"),
    )
    group.add_argument(
        "--decay-rate",
        type=float,
        metavar="X",
        help=_help("decay_rate", "factor of each step of --sched step"),
    )
    group.add_argument("--clip-grad", type=float, metavar="X", help="largest gradient norm")
    group.add_argument(
        "--smoothing", type=float, metavar="X", help=_help("smoothing", "label smoothing")
    )


def _add_run_flags(group: Any) -> None:
    group.add_argument("--device", metavar="NAME", help="device (default: CUDA if there is one)")
    group.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help=_help("amp", "automatic mixed precision"),
    )
    group.add_argument(
        "--amp-dtype",
        choices=["bfloat16", "float16"],
        help=_help("amp_dtype", "lower precision of --amp"),
    )
    group.add_argument("--seed", type=int, metavar="N", help=_help("seed", "seed"))
    group.add_argument("--output", metavar="DIR", help=_help("output", "folder of all runs"))
    group.add_argument(
        "--experiment", metavar="NAME", help="folder of this run (default: date, time and model)"
    )
    group.add_argument(
        "--plot",
        action=argparse.BooleanOptionalAction,
        help=_help("plot", "draw plot.png at the end"),
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue a run: a checkpoint or a run's folder; without PATH, that of --experiment"
        " or the newest in --output",
    )


def _help(name: str, text: str) -> str:
    default = getattr(TrainConfig, name)
    if isinstance(default, bool):
        default = "yes" if default else "no"
    return f"{text} (default: {default})"


class _Tuple(argparse.Action):
    """Stores several values as a tuple, as TrainConfig has them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values))
