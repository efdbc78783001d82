"""TrainConfig: everything that decides what a training run computes and where it is kept."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from ssprop_fx.config import SparsityConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.schedule_spec import parse_schedule

__all__ = ["TrainConfig"]

# What may differ between a run and its continuation: it does not change what is computed.
_FREE_ON_RESUME = {"output", "experiment", "data_dir", "device", "workers", "max_steps", "plot"}


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

    data_dir: str | None = None
    train_split: str = "train"
    val_split: str = "validation"
    img_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    batch_size: int = 64
    validation_batch_size: int | None = None
    workers: int = 0
    aug: bool = True
    scale: tuple[float, ...] | None = None
    ratio: tuple[float, ...] | None = None
    hflip: float | None = None
    color_jitter: float | None = None
    aa: str | None = None

    epochs: int = 10
    max_steps: int | None = None
    opt: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 2e-5
    sched: str = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: float = 30.0
    decay_rate: float = 0.1
    clip_grad: float | None = None
    smoothing: float = 0.1

    schedule: str = "bar:rate=0.8,period=2ep"
    sparsity_warmup_epochs: int = 0
    channel_multiple: int | None = None
    min_channels: int = SparsityConfig.min_channels
    compile_backend: str = "inductor"
    compile_mode: str | None = None

    device: str | None = None
    amp: bool = False
    amp_dtype: str = "bfloat16"
    channels_last: bool = True
    seed: int = 42

    output: str = "runs"
    experiment: str | None = None
    plot: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "min_channels", "lr", "decay_epochs", "decay_rate"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in (
            *("validation_batch_size", "img_size", "num_classes", "max_steps"),
            *("channel_multiple", "clip_grad"),
        ):
            self._check(name, getattr(self, name) is None or getattr(self, name) > 0, "above 0")
        for name in (
            *("workers", "warmup_epochs", "sparsity_warmup_epochs", "seed"),
            *("momentum", "weight_decay", "min_lr", "warmup_lr"),
        ):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("smoothing", "drop_path"):
            value = getattr(self, name)
            self._check(name, value is None or 0 <= value < 1, "in [0, 1)")
        self._check("hflip", self.hflip is None or 0 <= self.hflip <= 1, "in [0, 1]")
        for name in ("mean", "std"):
            value = getattr(self, name)
            self._check(name, value is None or len(value) in (1, 3), "one or three numbers")
        self._check("warmup_epochs", self.warmup_epochs < self.epochs, "below --epochs")
        if self.compile_backend == "aot_eager" and self.compile_mode is not None:
            raise CommandError(
                "--compile-mode is Inductor's: leave it out with --compile-backend aot_eager"
            )
        # The text is checked here, before any data is read; the length of an epoch, which turns
        # "2ep" into steps, is not known yet and any long one does.
        parse_schedule(self.schedule, steps_per_epoch=1_000_000)

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
