"""The flags of `ssprop-fx train`: one for each setting of TrainConfig, and a few more."""

import argparse
import ast
from typing import Any

from ssprop_passes.selection.policy import AXES, GRADIENTS
from ssprop_passes.selection.scores import SCORES
from ssprop_passes.selection.selectors import SELECTORS

from ssprop_fx.config import RANKS, TARGETS
from ssprop_fx.training.config import TrainConfig

__all__ = ["add_flags"]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags.

    Args:
        parser: parser of `train`; its `argument_default` must be SUPPRESS.
    """
    _add_data(parser.add_argument_group("data"))
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_model(parser.add_argument_group("model"))
    _add_sparsity(parser.add_argument_group("sparse back-propagation"))
    _add_optimizer(parser.add_argument_group("optimizer"))
    _add_schedule(parser.add_argument_group("learning rate"))
    _add_run(parser.add_argument_group("run"))


def _add_data(group: Any) -> None:
    _text(
        group,
        "data_dir",
        "DIR",
        "folder with one folder a split, one a class in each, or one tar a split; that of"
        " torchvision's files with --dataset",
    )
    _text(
        group,
        "dataset",
        "NAME",
        "one of torchvision's, as timm names them: torch/cifar10; nothing is downloaded",
    )
    _text(group, "train_split", "NAME", "folder of training images")
    _text(group, "val_split", "NAME", "folder of validation images; val or test will do as well")
    _int(group, "img_size", "height and width in pixels (default: the model's; digits: 64)")
    _floats(group, "mean", "+", "of each channel (default: the model's)")
    _floats(group, "std", "+", "of each channel (default: the model's)")
    _text(group, "interpolation", "NAME", "of validation images (default: the model's)")
    _float(group, "crop_pct", "part of validation images in the crop (default: the model's)")
    _int(group, "batch_size", "images in a batch of one process", "-b")
    _int(group, "validation_batch_size", "the same in validation (default: --batch-size)", "-vb")
    _int(group, "workers", "loader processes, 0 for none", "-j")


def _add_augmentation(group: Any) -> None:
    _switch(group, "aug", "augment training images")
    _text(group, "train_crop_mode", None, "kind of random crop", choices=["rrc", "rkrc", "rkrr"])
    _text(group, "train_interpolation", "NAME", "of training images, or random")
    _floats(group, "scale", 2, "area of random crops, as fractions")
    _floats(group, "ratio", 2, "aspect ratio of random crops")
    _float(group, "hflip", "probability of a mirror image")
    _float(group, "vflip", "probability of an image upside down")
    _float(group, "color_jitter", "strength")
    _text(group, "aa", "POLICY", "AutoAugment, such as rand-m9-mstd0.5")
    _float(group, "reprob", "probability of random erasing")
    _text(group, "remode", None, "what it leaves", choices=["const", "rand", "pixel"])
    _int(group, "recount", "rectangles that it erases")
    _float(group, "mixup", "alpha of mixup, 0 for none")
    _float(group, "cutmix", "alpha of cutmix, 0 for none")
    _floats(group, "cutmix_minmax", 2, "side of cutmix boxes, as fractions, in place of alpha")
    _float(group, "mixup_prob", "probability of either")
    _float(group, "mixup_switch_prob", "probability of cutmix where both are on")
    _text(group, "mixup_mode", None, "what is mixed as one", choices=["batch", "pair", "elem"])
    _int(group, "mixup_off_epoch", "epoch in which mixup and cutmix end, 0 for never")


def _add_model(group: Any) -> None:
    _text(group, "model", "NAME", "model of timm")
    _switch(group, "pretrained", "begin with timm's weights")
    _int(group, "num_classes", "classes (default: the dataset's)")
    _float(group, "drop_path", "drop path probability")
    _mapping(group, "model_kwargs", "further arguments of the model")
    _switch(group, "channels_last", "channels-last memory layout, the fast one for convolutions")


def _add_sparsity(group: Any) -> None:
    _text(group, "schedule", "TEXT", "drop rate over the run, or none; see below")
    _int(group, "sparsity_warmup_epochs", "dense epochs before the schedule begins")
    _add(
        group,
        "targets",
        "kinds of layer that take part",
        nargs="+",
        choices=TARGETS,
        action=_Tuple,
    )
    _int(
        group,
        "channel_multiple",
        "round keep counts to multiples of N (default: 16 on a CPU, 8 elsewhere)",
    )
    _int(group, "min_channels", "smaller layers stay dense")
    _text(group, "select", None, "which channels are kept", choices=list(SELECTORS))
    _text(group, "axis", None, "what is kept: channels, or samples", choices=list(AXES))
    _text(group, "score", None, "what a channel is worth", choices=list(SCORES))
    _text(group, "gradients", None, "which gradients are sparse", choices=list(GRADIENTS))
    _int(group, "block", "keep channels in blocks of N neighbours")
    _switch(group, "gate", "leave dense what is measured not to be faster sparse")
    _float(group, "memory", "share of what a step leaves out that is added in the next")
    _text(group, "ranks", None, "whose samples choose for a process of several", choices=RANKS)
    _mapping(group, "rates", "drop rates of layers by name pattern, such as 'layer4.*=0.5'")
    _float(
        group,
        "depth_slope",
        "drop so much more next to the input than the schedule's highest rate, as much less next to"
        " the output, and in all as many FLOPs",
    )
    _float(group, "kept_mass", "adapt drop rates so that each layer keeps so much of its score")
    _float(group, "added_error", "adapt them to so much squared error, a share of the gradient's")
    _float(group, "budget", "most of the backward's FLOPs that adapted sparse steps may take")
    _switch(group, "telemetry", "note the kept mass of each step")
    _text(
        group,
        "compile_backend",
        None,
        "torch.compile backend",
        choices=["inductor", "aot_eager"],
    )
    _text(
        group,
        "compile_mode",
        None,
        "torch.compile mode, with the Inductor backend",
        choices=["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
    )


def _add_optimizer(group: Any) -> None:
    _int(group, "epochs", "epochs")
    _int(group, "max_steps", "end the run after N steps")
    _text(group, "opt", "NAME", "optimizer of timm")
    _float(group, "momentum", "momentum")
    _float(group, "weight_decay", "weight decay")
    _mapping(group, "opt_kwargs", "further arguments of the optimizer, such as eps=1e-6")
    _int(group, "grad_accum_steps", "batches whose gradients make one step")
    _float(group, "clip_grad", "clip gradients at X (default: not at all)")
    _text(group, "clip_mode", None, "what is clipped", choices=["norm", "value", "agc"])
    _float(group, "smoothing", "label smoothing")
    _switch(group, "model_ema", "keep a moving average of the weights, and validate that")
    _float(group, "model_ema_decay", "its decay in a step")
    _switch(group, "model_ema_warmup", "begin with a smaller decay")


def _add_schedule(group: Any) -> None:
    _float(group, "lr", "learning rate")
    _text(
        group,
        "sched",
        None,
        "learning rate schedule of timm, stepped at each step",
        choices=[
            *("cosine", "tanh", "step", "multistep", "poly", "constant", "wsd", "rsqrt", "none"),
        ],
    )
    _int(group, "warmup_epochs", "LR warm-up epochs")
    _float(group, "warmup_lr", "LR it begins with")
    _float(group, "min_lr", "LR at the end")
    _float(group, "decay_epochs", "epochs between steps (30), or of the decay of wsd and rsqrt")
    _float(group, "decay_rate", "factor of each step, or power of poly")
    _mapping(group, "sched_kwargs", "further arguments of timm's create_scheduler_v2")


def _add_run(group: Any) -> None:
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings, such as a run's config.yaml; the command line wins",
    )
    _text(group, "device", "NAME", "device (default: CUDA if there is one)")
    _switch(group, "amp", "automatic mixed precision")
    _text(
        group,
        "amp_dtype",
        None,
        "lower precision of --amp",
        choices=["bfloat16", "float16"],
    )
    _int(group, "seed", "seed")
    _text(group, "output", "DIR", "folder of all runs")
    _text(group, "experiment", "NAME", "folder of this run (default: date, time and model)")
    _int(group, "checkpoint_every", "write last.pt every N steps as well as at an epoch's end")
    _switch(group, "plot", "draw plot.png at the end")
    _switch(group, "tensorboard", "write TensorBoard event files")
    _switch(group, "energy", "measure energy, where zeus and the machine's counters allow it")
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="continue a run: a checkpoint or a run's folder; without PATH, that of --experiment"
        " or the newest in --output",
    )


def _text(group: Any, name: str, metavar: str | None, text: str, **kwargs: Any) -> None:
    if metavar is not None:
        kwargs["metavar"] = metavar
    _add(group, name, text, **kwargs)


def _int(group: Any, name: str, text: str, *short: str) -> None:
    _add(group, name, text, *short, type=int, metavar="N")


def _float(group: Any, name: str, text: str) -> None:
    _add(group, name, text, type=float, metavar="X")


def _floats(group: Any, name: str, number: int | str, text: str) -> None:
    _add(group, name, text, type=float, metavar="X", nargs=number, action=_Tuple)


def _switch(group: Any, name: str, text: str) -> None:
    _add(group, name, text, action=argparse.BooleanOptionalAction)


def _mapping(group: Any, name: str, text: str) -> None:
    _add(group, name, text, nargs="*", metavar="KEY=VALUE", action=_Mapping)


def _add(group: Any, name: str, text: str, *short: str, **kwargs: Any) -> None:
    default = getattr(TrainConfig, name)
    if default is not None:
        shown = {True: "yes", False: "no"}[default] if isinstance(default, bool) else default
        shown = " ".join(shown) if isinstance(shown, tuple) else shown
        text = f"{text} (default: {shown})"
    group.add_argument(*short, "--" + name.replace("_", "-"), dest=name, help=text, **kwargs)


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


class _Mapping(argparse.Action):
    """Stores KEY=VALUE pairs as a dict; a value is a Python literal, or else a text."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        pairs = {}
        for item in values:
            key, equals, value = item.partition("=")
            if not equals or not key:
                raise argparse.ArgumentError(self, f"right would be KEY=VALUE, got {item!r}")
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                pairs[key] = value
        setattr(namespace, self.dest, pairs)
