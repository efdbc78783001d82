"""TrainConfig: everything that decides what a training run computes and where it is kept."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ssprop_fx.config import SparsityConfig
from ssprop_fx.options import options_of
from ssprop_fx.scheduling.controllers import Controller
from ssprop_fx.scheduling.parse import CONTROLLERS, parse_controller, parse_schedule
from ssprop_fx.scheduling.sample_rules import SampleRule
from ssprop_fx.training.augmentation import Augmentation
from ssprop_fx.training.errors import CommandError, flag_error
from ssprop_fx.training.settings import (
    AugmentationSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    RateSettings,
    RunSettings,
    SparsitySettings,
)

__all__ = ["TrainConfig"]

_DEFAULT_CONTROLLER = CONTROLLERS["added_noise"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunSettings,
    RateSettings,
    OptimizerSettings,
    SparsitySettings,
    ModelSettings,
    AugmentationSettings,
    DataSettings,
):
    """Settings of one training run; each is the flag of `ssprop-fx train` of the same name.

    `sparsity` holds those of sparse back-propagation, which are flags too.

    Raises:
        CommandError: a setting has the wrong type or is out of its range.

    Example:
        >>> config = TrainConfig(lr=0.1, sparsity=SparsityConfig(min_channels=64))
        >>> config == TrainConfig.from_settings({"lr": 0.1, "min_channels": 64})
        True
    """

    def __post_init__(self) -> None:
        for option in options_of(TrainConfig).values():
            if option.name not in options_of(SparsityConfig):
                self._check_option(option.name)
        if self.aug_kwargs is not None:
            kept = self.augmentation.changed() or None
            object.__setattr__(self, "aug_kwargs", kept)
        for name in options_of(SparsityConfig):
            if callable(getattr(self.sparsity, name)):
                raise CommandError(f"{name} must be a text in a TrainConfig, which files keep")
        self._fill_recipe()
        for name in ("mean", "std"):
            value = getattr(self, name)
            self._require(name, value is None or len(value) in (1, 3), "one or three numbers")
        if self.has_mixup:
            self._require("batch_size", self.batch_size % 2 == 0, "even with mixup or cutmix")
        self._require("warmup_epochs", self.warmup_epochs < self.epochs, "below --epochs")
        self._check_controller()
        if self.compile_backend == "aot_eager" and self.compile_mode is not None:
            raise CommandError(
                "--compile-mode is Inductor's: leave it out with --compile-backend aot_eager"
            )
        # The text is checked here, before any data is read; the length of an epoch, which turns
        # "2ep" into steps, is not known yet and any long one does.
        assert self.schedule is not None
        try:
            parse_schedule(self.schedule, steps_per_epoch=1_000_000)
        except ValueError as error:
            raise CommandError(f"--schedule {error}") from error

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation settings of `--aug-kwargs`."""
        return Augmentation.from_pairs(self.aug_kwargs or {})

    @property
    def has_mixup(self) -> bool:
        """Whether training images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0 or self.augmentation.cutmix_minmax is not None

    @property
    def has_controller(self) -> bool:
        """Whether the drop rates of layers are adapted."""
        return self.controller is not None

    def create_controller(self) -> Controller | SampleRule | None:
        """Return what adapts the drop rates; None if nothing does."""
        return None if self.controller is None else parse_controller(self.controller)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by the names of their flags, as plain values for a checkpoint."""
        sparsity = options_of(SparsityConfig)
        return {
            name: copy.deepcopy(getattr(self.sparsity if name in sparsity else self, name))
            for name, option in options_of(TrainConfig).items()
            if option.has_text
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "TrainConfig":
        """Return the configuration that settings by the names of their flags make.

        Args:
            settings: name -> value. Keys of `--aug-kwargs` may be among the names. None leaves
                a setting of sparse back-propagation at its default.

        Raises:
            CommandError: a setting is unknown or wrong.
        """
        own = {name: value for name, value in settings.items() if value is not None}
        sparse = {name: own.pop(name) for name in options_of(SparsityConfig) if name in own}
        pairs = {name: own.pop(name) for name in options_of(Augmentation) if name in own}
        if pairs:
            own["aug_kwargs"] = {**own.get("aug_kwargs", {}), **pairs}
        if own.get("recipe") == "samples" and sparse.get("axis") == "channel":
            raise CommandError("--axis must be sample with --recipe samples, got 'channel'")
        unknown = sorted(set(own) - set(options_of(cls)))
        if unknown:
            raise CommandError(f"there is no setting {', '.join(unknown)}")
        try:
            sparsity = SparsityConfig(**sparse)
        except (TypeError, ValueError) as error:
            raise flag_error(error) from error
        return cls(**own, sparsity=sparsity)

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
        known = options_of(cls)
        unknown = set(saved) - set(known) - set(options_of(Augmentation))
        if unknown:
            raise CommandError(
                f"the checkpoint comes from another version: it has {', '.join(sorted(unknown))}"
            )
        before = cls.from_settings(saved).to_dict()
        after = cls.from_settings({**before, **given})
        for name in given:
            value = after.to_dict()[name]
            if not known[name].free_on_resume and value != before[name]:
                raise CommandError(
                    f"{known[name].flag} cannot change on --resume: the run was started with"
                    f" {before[name]!r}, got {value!r}; leave it out or start a new run"
                )
        return after

    def _fill_recipe(self) -> None:
        """Set what the recipe decides, so that the settings show what is done."""
        takes_samples = self.recipe == "samples"
        if takes_samples and self.sparsity.axis != "sample":
            try:
                sparsity = replace(self.sparsity, axis="sample")
            except ValueError as error:
                raise flag_error(error) from error
            object.__setattr__(self, "sparsity", sparsity)
        if takes_samples and self.controller is None:
            object.__setattr__(self, "controller", _DEFAULT_CONTROLLER)
        if self.schedule is None:
            schedule = "constant:rate=0.5" if takes_samples else "bar:rate=0.8,period=2ep"
            object.__setattr__(self, "schedule", schedule)

    def _check_controller(self) -> None:
        try:
            controller = self.create_controller()
        except ValueError as error:
            raise CommandError(f"--controller {error}") from error
        kind, axis = (
            (SampleRule, "sample") if self.sparsity.axis == "sample" else (Controller, "channel")
        )
        if controller is not None and not isinstance(controller, kind):
            right = "channel" if axis == "sample" else "sample"
            raise CommandError(
                f"--axis must be {right} with --controller {self.controller}, got {axis!r}"
            )

    def _check_option(self, name: str) -> None:
        try:
            options_of(TrainConfig)[name].check(getattr(self, name))
        except (TypeError, ValueError) as error:
            raise flag_error(error) from error

    def _require(self, name: str, right: bool, rule: str) -> None:
        if not right:
            flag = options_of(TrainConfig)[name].flag
            raise CommandError(f"{flag} must be {rule}, got {getattr(self, name)!r}")
