"""The settings of a training run, in the groups that `ssprop-fx train --help` shows."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ssprop_fx.config import SparsityConfig
from ssprop_fx.options import option

__all__ = [
    "GROUPS",
    "AugmentationSettings",
    "DataSettings",
    "ModelSettings",
    "OptimizerSettings",
    "RateSettings",
    "RunSettings",
    "SparsitySettings",
]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Images and batches."""

    title: ClassVar[str] = "data"

    data_dir: str | None = option(
        None,
        help="Read images from this folder: one folder or one tar for each split",
        unset="the digits of scikit-learn",
        metavar="DIR",
        free_on_resume=True,
    )
    dataset: str | None = option(
        None, help="Read a dataset of torchvision from --data-dir, such as torch/cifar10"
    )
    train_split: str = option("train", help="Train on the images of this split")
    val_split: str = option("validation", help="Validate on the images of this split")
    img_size: int | None = option(
        None,
        help="Resize images to this height and width in pixels",
        unset="the model's, or 64 for digits",
        rule="above 0",
    )
    mean: tuple[float, ...] | None = option(
        None, help="Subtract this mean from each colour channel", unset="the model's"
    )
    std: tuple[float, ...] | None = option(
        None, help="Divide each colour channel by this number", unset="the model's"
    )
    interpolation: str | None = option(
        None, help="Resize validation images with this method", unset="the model's"
    )
    crop_pct: float | None = option(
        None,
        help="Keep this fraction of a validation image's height and width",
        unset="the model's",
        rule="above 0",
    )
    batch_size: int = option(
        64, help="Put this many images in a batch of each process", rule="above 0", short="-b"
    )
    validation_batch_size: int | None = option(
        None,
        help="Put this many images in a validation batch",
        unset="--batch-size",
        rule="above 0",
        short="-vb",
    )
    workers: int = option(
        0,
        help="Load images with this many extra processes",
        rule="at least 0",
        short="-j",
        free_on_resume=True,
    )


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """Augmentation of training images; the rarer settings are in `augmentation.py`."""

    title: ClassVar[str] = "augmentation"

    aug: bool = option(True, help="Augment training images")
    aa: str | None = option(
        None, help="Apply this AutoAugment policy, such as rand-m9-mstd0.5", metavar="POLICY"
    )
    reprob: float = option(
        0.0, help="Erase a random rectangle with this probability", rule="in [0, 1]"
    )
    mixup: float = option(
        0.0, help="Mix pairs of images with this alpha; 0 turns it off", rule="at least 0"
    )
    cutmix: float = option(
        0.0, help="Paste a box of another image with this alpha; 0 turns it off", rule="at least 0"
    )
    aug_kwargs: dict[str, Any] | None = option(
        None, help="Change further augmentation settings, such as hflip=0"
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model."""

    title: ClassVar[str] = "model"

    model: str = option("resnet18", help="Train this model of timm")
    pretrained: bool = option(False, help="Start from timm's pretrained weights")
    pretrained_path: str | None = option(
        None,
        help="Start from the pretrained weights in this file, in any form that timm converts for"
        " the model",
        metavar="FILE",
    )
    initial_checkpoint: str | None = option(
        None,
        help="Start from the weights in this file, which have the model's own names",
        metavar="FILE",
    )
    num_classes: int | None = option(
        None, help="Give the model this many classes", unset="the dataset's", rule="above 0"
    )
    drop_path: float | None = option(
        None,
        help="Skip residual branches with this probability",
        unset="the model's",
        rule="in [0, 1)",
    )
    model_kwargs: dict[str, Any] | None = option(
        None, help="Pass further arguments to the model, such as drop_rate=0.1"
    )
    freeze_batch_norm: bool = option(
        False, help="Leave the statistics of batch norms as they are, for fine-tuning"
    )
    channels_last: bool = option(
        True, help="Store images channels last, which is faster for convolutions"
    )


@dataclass(frozen=True, kw_only=True)
class SparsitySettings:
    """Sparse back-propagation: schedule, layers, selection, compiler."""

    title: ClassVar[str] = "sparse back-propagation"

    recipe: Literal["channels", "samples"] = option(
        "channels",
        help="Drop channels by the schedule, or samples as the step's gradients allow: --axis"
        " sample with a controller",
    )
    schedule: str | None = option(
        None,
        help="Follow this schedule of drop rates; none is dense",
        unset="bar:rate=0.8,period=2ep; with --recipe samples every step is sparse",
        metavar="TEXT",
    )
    sparsity_warmup_epochs: int = option(
        0, help="Train this many dense epochs before the schedule begins", rule="at least 0"
    )
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    controller: str | None = option(
        None,
        help="Adapt what is kept, such as kept_mass:target=0.9; added_noise is for samples,"
        " added_error for channels",
        unset="added_noise:target=0.1 with --recipe samples",
        metavar="TEXT",
    )
    compile_backend: Literal["inductor", "aot_eager"] = option(
        "inductor", help="Compile with this backend of torch.compile"
    )
    compile_mode: (
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None
    ) = option(None, help="Compile in this mode of torch.compile; inductor only")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer and loss."""

    title: ClassVar[str] = "optimizer"

    epochs: int = option(10, help="Train for this many epochs", rule="above 0")
    max_steps: int | None = option(
        None, help="End the run after this many steps", rule="above 0", free_on_resume=True
    )
    opt: str = option("sgd", help="Train with this optimizer of timm")
    momentum: float = option(0.9, help="Set the momentum", rule="at least 0")
    weight_decay: float = option(2e-5, help="Set the weight decay", rule="at least 0")
    opt_kwargs: dict[str, Any] | None = option(
        None, help="Pass further arguments to the optimizer, such as eps=1e-6"
    )
    grad_accum_steps: int = option(
        1, help="Add up the gradients of this many batches for each step", rule="above 0"
    )
    clip_grad: float | None = option(
        None, help="Clip gradients at this value", unset="no clipping", rule="above 0"
    )
    clip_mode: Literal["norm", "value", "agc"] = option(
        "norm", help="Clip the norm, each value, or adaptively"
    )
    smoothing: float = option(0.1, help="Smooth labels by this much", rule="in [0, 1)")
    model_ema: bool = option(False, help="Keep a moving average of the weights, and validate it")
    model_ema_decay: float = option(
        0.9998, help="Keep this share of the average in each step", rule="in [0, 1)"
    )
    model_ema_warmup: bool = option(False, help="Start the average with a smaller decay")


@dataclass(frozen=True, kw_only=True)
class RateSettings:
    """Learning rate."""

    title: ClassVar[str] = "learning rate"

    lr: float = option(0.05, help="Set the learning rate", rule="above 0")
    sched: Literal[
        "cosine", "tanh", "step", "multistep", "poly", "constant", "wsd", "rsqrt", "none"
    ] = option("cosine", help="Follow this learning rate schedule of timm")
    warmup_epochs: int = option(
        0, help="Raise the learning rate over this many epochs first", rule="at least 0"
    )
    sched_kwargs: dict[str, Any] | None = option(
        None,
        help="Pass further arguments to the learning rate schedule, such as min_lr=1e-6,"
        " warmup_lr=1e-5, decay_epochs=30 or decay_rate=0.1",
    )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Device, precision, and what a run keeps."""

    title: ClassVar[str] = "run"

    device: str | None = option(
        None, help="Train on this device", unset="CUDA, else the CPU", free_on_resume=True
    )
    amp: bool = option(False, help="Use automatic mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = option(
        "bfloat16", help="Use this lower precision with --amp"
    )
    seed: int = option(42, help="Set the random seed", rule="at least 0")
    output: str = option(
        "runs", help="Keep all runs in this folder", metavar="DIR", free_on_resume=True
    )
    experiment: str | None = option(
        None,
        help="Keep this run in a folder of this name",
        unset="date, time and model",
        free_on_resume=True,
    )
    checkpoint_every: int | None = option(
        None,
        help="Write last.pt every so many steps too",
        unset="after each epoch",
        rule="above 0",
        free_on_resume=True,
    )
    plot: bool = option(True, help="Draw plot.png at the end", free_on_resume=True)
    tensorboard: bool = option(False, help="Write TensorBoard event files", free_on_resume=True)
    energy: bool = option(
        True, help="Measure energy if zeus and the machine can", free_on_resume=True
    )


GROUPS = (
    *(DataSettings, AugmentationSettings, ModelSettings, SparsitySettings),
    *(OptimizerSettings, RateSettings, RunSettings),
)
