"""TrainConfig: everything that decides what a training run computes and where it is kept."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ssprop_fx.config import TARGETS, SparsityConfig
from ssprop_fx.scheduling.parse import parse_schedule
from ssprop_fx.training.errors import CommandError

__all__ = ["TrainConfig"]

# What may differ between a run and its continuation: it does not change what is computed.
_FREE_ON_RESUME = {
    *("output", "experiment", "data_dir", "device", "workers", "max_steps", "checkpoint_every"),
    *("plot", "tensorboard", "energy"),
}

_RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "above 0",
        lambda value: value > 0,
        (
            *("batch_size", "validation_batch_size", "img_size", "num_classes", "crop_pct"),
            *("recount", "epochs", "max_steps", "lr", "decay_epochs", "decay_rate", "clip_grad"),
            *("grad_accum_steps", "min_channels", "channel_multiple", "checkpoint_every"),
            *("block",),
        ),
    ),
    (
        "at least 0",
        lambda value: value >= 0,
        (
            *("workers", "warmup_epochs", "sparsity_warmup_epochs", "seed", "mixup", "cutmix"),
            *("mixup_off_epoch", "momentum", "weight_decay", "min_lr", "warmup_lr"),
        ),
    ),
    (
        "in [0, 1)",
        lambda value: 0 <= value < 1,
        ("smoothing", "drop_path", "model_ema_decay", "memory"),
    ),
    (
        "in [0, 1]",
        lambda value: 0 <= value <= 1,
        ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run; each is the flag of `ssprop-fx train` of the same name.

    Raises:
        CommandError: a setting is out of its range.
    """

    model: str = "resnet18"
    pretrained: bool = False
    num_classes: int | None = None
    drop_path: float | None = None
    model_kwargs: dict[str, Any] | None = None

    dataset: str | None = None
    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    img_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    batch_size: int = 64
    validation_batch_size: int | None = None
    workers: int = 0

    aug: bool = True
    train_crop_mode: str | None = None
    train_interpolation: str | None = None
    scale: tuple[float, ...] | None = None
    ratio: tuple[float, ...] | None = None
    hflip: float | None = None
    vflip: float | None = None
    color_jitter: float | None = None
    aa: str | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, ...] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0

    epochs: int = 10
    max_steps: int | None = None
    opt: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 2e-5
    opt_kwargs: dict[str, Any] | None = None
    sched: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: float | None = None
    decay_rate: float = 0.1
    sched_kwargs: dict[str, Any] | None = None
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = "norm"
    smoothing: float = 0.1
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False

    schedule: str = "bar:rate=0.8,period=2ep"
    sparsity_warmup_epochs: int = 0
    targets: tuple[str, ...] = TARGETS
    channel_multiple: int | None = None
    min_channels: int = SparsityConfig.min_channels
    select: str = "topk"
    axis: str = "channel"
    score: str = "l2"
    gradients: str = "both"
    block: int = 1
    gate: bool = True
    memory: float = SparsityConfig.memory
    ranks: str = SparsityConfig.ranks
    rates: dict[str, float] | None = None
    depth_slope: float = 0.0
    kept_mass: float | None = None
    added_error: float | None = None
    budget: float | None = None
    telemetry: bool = False
    compile_backend: str = "inductor"
    compile_mode: str | None = None

    device: str | None = None
    amp: bool = False
    amp_dtype: str = "bfloat16"
    channels_last: bool = True
    seed: int = 42

    output: str = "runs"
    experiment: str | None = None
    checkpoint_every: int | None = None
    plot: bool = True
    tensorboard: bool = False
    energy: bool = True

    def __post_init__(self) -> None:
        for rule, is_right, names in _RULES:
            for name in names:
                value = getattr(self, name)
                self._check(name, value is None or is_right(value), rule)
        for name in ("mean", "std"):
            value = getattr(self, name)
            self._check(name, value is None or len(value) in (1, 3), "one or three numbers")
        if (span := self.cutmix_minmax) is not None:
            is_span = len(span) == 2 and 0 <= span[0] < span[1] <= 1
            self._check("cutmix_minmax", is_span, "two numbers in [0, 1], the smaller first")
        if self.has_mixup:
            self._check("batch_size", self.batch_size % 2 == 0, "even with mixup or cutmix")
        self._check("warmup_epochs", self.warmup_epochs < self.epochs, "below --epochs")
        if self.kept_mass is not None and self.added_error is not None:
            raise CommandError("--added-error: a layer has one target, and --kept-mass is given")
        if self.budget is not None and not self.has_controller:
            raise CommandError(
                "--budget bounds what --kept-mass or --added-error take; neither is given"
            )
        if self.compile_backend == "aot_eager" and self.compile_mode is not None:
            raise CommandError(
                "--compile-mode is Inductor's: leave it out with --compile-backend aot_eager"
            )
        # The text is checked here, before any data is read; the length of an epoch, which turns
        # "2ep" into steps, is not known yet and any long one does.
        try:
            parse_schedule(self.schedule, steps_per_epoch=1_000_000)
        except ValueError as error:
            raise CommandError(f"--schedule {error}") from error

    @property
    def has_mixup(self) -> bool:
        """Whether training images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def has_controller(self) -> bool:
        """Whether the drop rates of layers are adapted."""
        return self.kept_mass is not None or self.added_error is not None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def resumed(cls, saved: dict[str, Any], given: dict[str, Any]) -> "TrainConfig":
        """Return the settings of an interrupted run, for its continuation.

        Args:
            saved: settings in the checkpoint.
            given: settings that the command line names. Those that change what is computed must
                equal the saved ones.

        Raises:
            CommandError: a setting that must not change differs, or the checkpoint names a
                setting that does not exist.
        """
        unknown = set(saved) - {field.name for field in fields(cls)}
        if unknown:
            raise CommandError(
                f"the checkpoint comes from another version: it has {', '.join(sorted(unknown))}"
            )
        for name, value in given.items():
            if name not in _FREE_ON_RESUME and value != saved.get(name, value):
                raise CommandError(
                    f"{_flag(name)} cannot change on --resume: the run was started with"
                    f" {saved[name]!r}, got {value!r}; leave it out or start a new run"
                )
        return cls(**{**saved, **given})

    def _check(self, name: str, right: bool, rule: str) -> None:
        if not right:
            raise CommandError(f"{_flag(name)} must be {rule}, got {getattr(self, name)!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
