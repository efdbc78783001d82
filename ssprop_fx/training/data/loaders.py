"""The loaders of a run, with timm's transforms."""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import Mixup, create_loader

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.datasets import Datasets
from ssprop_fx.training.data.sampling import EpochSampler, SeededDataset, derive_seed, seeded
from ssprop_fx.training.distributed import Processes
from ssprop_fx.training.errors import CommandError

__all__ = ["Batch", "Loaders", "create_loaders", "create_mixup"]

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Loaders:
    """The two loaders of a run.

    Attributes:
        train: batches of (images, labels); images are float32 [N, 3, H, W].
        validation: the same; its last batch may be smaller.
        sampler: selects the epoch that `train` yields.
        steps_per_epoch: number of training steps in a whole epoch.
        images_per_step: number of images in a step, over all processes and accumulated batches.
    """

    train: Iterable[Batch]
    validation: Iterable[Batch]
    sampler: EpochSampler
    steps_per_epoch: int
    images_per_step: int


def create_loaders(
    config: TrainConfig,
    datasets: Datasets,
    data_config: dict[str, Any],
    processes: Processes,
    steps_per_epoch: int | None = None,
) -> Loaders:
    """Make the loaders.

    The training loader leaves out a smaller last step, because a batch of another size makes
    torch.compile compile again.

    Args:
        config: settings of the run.
        datasets: the datasets to load.
        data_config: input size and normalisation, as in `timm.data.resolve_data_config`.
        processes: processes of the run; on CUDA, batches are normalised on the device.
        steps_per_epoch: number of steps of an epoch; None takes as many as there are images for.

    Raises:
        CommandError: the training dataset is smaller than a step.
    """
    images_per_step = config.batch_size * config.grad_accum_steps * processes.world_size
    whole_steps = len(datasets.train) // images_per_step
    steps_per_epoch = steps_per_epoch or whole_steps
    if whole_steps == 0:
        factors = ((config.grad_accum_steps, "batches"), (processes.world_size, "processes"))
        times = "".join(f" in {number} {name}" for number, name in factors if number > 1)
        raise CommandError(
            f"--batch-size {config.batch_size}{times} is more than the {len(datasets.train)}"
            " training images"
        )
    common: dict[str, Any] = {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": config.workers,
        "worker_seeding": _ignore_interrupts,
        "pin_memory": processes.device.type == "cuda",
        "device": processes.device,
    }
    on_cuda = processes.device.type == "cuda"
    augmentation = config.augmentation
    given = {
        name: getattr(augmentation, name)
        for name in ("train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")
        if getattr(augmentation, name) is not None
    }
    if augmentation.train_interpolation is not None:
        given["interpolation"] = augmentation.train_interpolation
    train = create_loader(
        SeededDataset(datasets.train, config.seed),
        batch_size=config.batch_size,
        is_training=True,
        no_aug=not config.aug,
        auto_augment=config.aa,
        re_prob=config.reprob if config.aug else 0.0,
        re_mode=augmentation.remode,
        re_count=augmentation.recount,
        # The prefetcher's random erasing would ignore the samples' seeds.
        use_prefetcher=on_cuda and config.reprob == 0,
        **{**datasets.augmentation, **given},
        **common,
    )
    sampler = EpochSampler(
        len(datasets.train),
        config.seed,
        used=steps_per_epoch * images_per_step,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    train.batch_sampler.sampler = sampler
    validation = create_loader(
        datasets.validation,
        batch_size=config.validation_batch_size or config.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        use_prefetcher=on_cuda,
        **common,
    )
    # Each process validates its own part; no image repeats to fill a batch.
    validation.batch_sampler.sampler = range(
        processes.rank, len(datasets.validation), processes.world_size
    )
    for loader in (train, validation):
        # By default an iterator draws its workers' seed from dropout's generator. A run that
        # resumes inside an epoch makes one more iterator, which would change dropout.
        getattr(loader, "loader", loader).generator = torch.Generator()
    return Loaders(train, validation, sampler, steps_per_epoch, images_per_step)


def create_mixup(config: TrainConfig, num_classes: int) -> Callable[..., Batch] | None:
    """Return timm's mixup and cutmix, or None if the run uses neither.

    Args:
        config: settings of the run.
        num_classes: number of outputs of the model.

    Returns:
        Function (images, labels, epoch, *key) -> (images, [N, num_classes] label distributions).
        Its random numbers depend only on the seed and the key. It smooths the labels itself.
    """
    if not config.has_mixup:
        return None
    augmentation = config.augmentation
    mixup = Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=augmentation.cutmix_minmax,
        prob=augmentation.mixup_prob,
        switch_prob=augmentation.mixup_switch_prob,
        mode=augmentation.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )

    def mix(images: torch.Tensor, labels: torch.Tensor, epoch: int, *key: int) -> Batch:
        mixup.mixup_enabled = not 0 < augmentation.mixup_off_epoch <= epoch
        with seeded(derive_seed(config.seed, "mixup", *key)):
            mixed: Batch = mixup(images, labels)
        return mixed

    return mix


def _ignore_interrupts(worker_info: Any) -> int:
    """Keep loader workers alive on Ctrl-C, so that the main process can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return int(worker_info.seed)
