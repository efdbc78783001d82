"""Datasets and loaders: scikit-learn's digits, or a folder of images."""

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_dataset, create_loader
from torch.utils.data import Dataset

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.sampling import EpochSampler, SeededDataset

__all__ = ["Datasets", "Digits", "Loaders", "create_datasets", "create_loaders"]

_DIGITS_CLASSES = 10
_DIGITS_DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, 64, 64),
    "mean": (0.305,) * 3,
    "std": (0.376,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
# A mirrored digit is no digit, and a crop of a twelfth of one could be any.
_DIGITS_AUGMENTATION: dict[str, Any] = {
    "scale": (0.7, 1.0),
    "ratio": (0.9, 1.1),
    "hflip": 0.0,
    "color_jitter": 0.0,
    "interpolation": "bilinear",
}
# What timm's own training script defaults to.
_FOLDER_AUGMENTATION: dict[str, Any] = {
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "hflip": 0.5,
    "color_jitter": 0.4,
    "interpolation": "random",
}
_TRAIN_NAMES = ("train", "training")
_VALIDATION_NAMES = ("validation", "val", "valid", "eval", "test")


class Digits(Dataset[tuple[Any, int]]):
    """Scikit-learn's handwritten digits: 1797 scans of 8x8 pixels, 10 classes.

    Args:
        train: the training part (1437 images) or the validation part (360); the split is
            stratified and always the same.
    """

    def __init__(self, train: bool) -> None:
        digits = load_digits()
        parts = train_test_split(
            digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
        )
        images, labels = (parts[0], parts[2]) if train else (parts[1], parts[3])
        # The scans have 17 grey levels, 0 to 16.
        self._images = [
            Image.fromarray((image * 255 / 16).astype("uint8")).convert("RGB") for image in images
        ]
        self._labels = [int(label) for label in labels]
        self.transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._images[index]
        return (image if self.transform is None else self.transform(image)), self._labels[index]

    def __len__(self) -> int:
        return len(self._labels)


@dataclass(frozen=True)
class Datasets:
    """The two datasets of a run, and what their loaders need to know about them.

    Attributes:
        train: training images and labels.
        validation: validation images and labels.
        num_classes: number of classes in the training dataset.
        data_config: settings that replace the model's own, as of `timm.data.resolve_data_config`.
        augmentation: settings of timm's training transform.
    """

    train: Any
    validation: Any
    num_classes: int
    data_config: dict[str, Any]
    augmentation: dict[str, Any]


@dataclass(frozen=True)
class Loaders:
    """The two loaders of a run.

    Attributes:
        train: batches of (images, labels); images are float32 [N, 3, H, W].
        validation: the same; its last batch may be smaller.
        sampler: decides which epoch `train` yields.
        steps_per_epoch: number of training batches in a whole epoch.
    """

    train: Iterable[tuple[torch.Tensor, torch.Tensor]]
    validation: Iterable[tuple[torch.Tensor, torch.Tensor]]
    sampler: EpochSampler
    steps_per_epoch: int


def create_datasets(config: TrainConfig) -> Datasets:
    """Open the datasets that `config` names.

    Raises:
        CommandError: a folder is missing or holds no images.
    """
    if config.data_dir is None:
        return Datasets(
            Digits(train=True),
            Digits(train=False),
            _DIGITS_CLASSES,
            _DIGITS_DATA_CONFIG,
            _DIGITS_AUGMENTATION,
        )
    root = Path(config.data_dir)
    if not root.is_dir():
        raise CommandError(f"--data-dir {root}: no such folder")
    train = _open_folder(_find_split(root, "--train-split", config.train_split, _TRAIN_NAMES))
    class_map = train.reader.class_to_idx
    validation = _open_folder(
        _find_split(root, "--val-split", config.val_split, _VALIDATION_NAMES), class_map
    )
    return Datasets(train, validation, len(class_map), {}, _FOLDER_AUGMENTATION)


def create_loaders(
    config: TrainConfig, datasets: Datasets, data_config: dict[str, Any], device: torch.device
) -> Loaders:
    """Make the loaders.

    The training loader leaves out a last batch that is smaller than the others, because a batch
    of another size makes torch.compile compile again.

    Args:
        config: settings of the run.
        datasets: what to load.
        data_config: input size and normalisation, as of `timm.data.resolve_data_config`.
        device: where the batches are used; on CUDA they are normalised there.

    Raises:
        CommandError: the training dataset is smaller than a batch.
    """
    steps_per_epoch = len(datasets.train) // config.batch_size
    if steps_per_epoch == 0:
        raise CommandError(
            f"--batch-size {config.batch_size} is more than the {len(datasets.train)} training"
            " images"
        )
    common: dict[str, Any] = {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": config.workers,
        "worker_seeding": _ignore_interrupts,
        "use_prefetcher": device.type == "cuda",
        "pin_memory": device.type == "cuda",
        "device": device,
    }
    given = {
        name: getattr(config, name)
        for name in ("scale", "ratio", "hflip", "color_jitter")
        if getattr(config, name) is not None
    }
    train = create_loader(
        SeededDataset(datasets.train, config.seed),
        batch_size=config.batch_size,
        is_training=True,
        no_aug=not config.aug,
        auto_augment=config.aa,
        **{**datasets.augmentation, **given},
        **common,
    )
    sampler = EpochSampler(len(datasets.train), config.seed)
    train.batch_sampler.sampler = sampler
    validation = create_loader(
        datasets.validation,
        batch_size=config.validation_batch_size or config.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        **common,
    )
    for loader in (train, validation):
        # An iterator draws its workers' seed from the generator that dropout uses as well, and a
        # run that continues in the middle of an epoch makes one iterator more.
        getattr(loader, "loader", loader).generator = torch.Generator()
    return Loaders(train, validation, sampler, steps_per_epoch)


def _find_split(root: Path, flag: str, name: str, synonyms: tuple[str, ...]) -> Path:
    # timm falls back to the root folder, which would train and validate on the same images.
    names = (name, *synonyms) if name in synonyms else (name,)
    for candidate in names:
        if (root / candidate).is_dir():
            return root / candidate
    present = sorted(path.name for path in root.iterdir() if path.is_dir())[:8]
    raise CommandError(
        f"{flag} {name}: no folder {' or '.join(dict.fromkeys(names))} in {root};"
        f" it has {', '.join(present) if present else 'no folders'}"
    )


def _open_folder(folder: Path, class_map: dict[str, int] | None = None) -> Any:
    try:
        dataset = create_dataset("", root=str(folder), search_split=False, class_map=class_map)
    except RuntimeError as error:
        raise CommandError(
            f"{folder}: no images found; right would be {folder}/CLASS/IMAGE.jpg"
            + (", with the classes of the training folder" if class_map else "")
        ) from error
    return dataset


def _ignore_interrupts(worker_info: Any) -> int:
    """Keep loader workers alive on Ctrl-C, so that the main process can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return int(worker_info.seed)
