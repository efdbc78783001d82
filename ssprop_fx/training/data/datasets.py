"""The datasets of a run: scikit-learn's digits, images in folders or tars, or torchvision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data import digits
from ssprop_fx.training.data.folders import LeftOut
from ssprop_fx.training.data.images import to_rgb
from ssprop_fx.training.data.splits import (
    TRAIN_NAMES,
    VALIDATION_NAMES,
    find_split,
    open_split,
)
from ssprop_fx.training.errors import CommandError

__all__ = ["Datasets", "create_datasets"]

# The defaults of timm's training script.
_AUGMENTATION: dict[str, Any] = {
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "hflip": 0.5,
    "color_jitter": 0.4,
    "interpolation": "random",
}
_TORCH = "torch/"


@dataclass(frozen=True)
class Datasets:
    """The two datasets of a run, and settings for their loaders.

    Attributes:
        train: training images and labels; `labels` and `names` list those of all images, where
            the dataset knows them without reading images.
        validation: the same of the validation images.
        classes: names of the classes, in the order of the labels.
        data_config: settings that replace the model's own, as in `timm.data.resolve_data_config`.
        augmentation: settings of timm's training transform.
        left_out: what in the folder of a split is no image of a class.
    """

    train: Any
    validation: Any
    classes: Sequence[str]
    data_config: dict[str, Any]
    augmentation: dict[str, Any]
    left_out: Mapping[Path, LeftOut] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def create_datasets(config: TrainConfig) -> Datasets:
    """Open the datasets that `config` names.

    Raises:
        CommandError: the dataset is unknown, is not in `config.data_dir`, or does not fit.
    """
    if config.dataset is None and config.data_dir is None:
        return Datasets(
            digits.Digits(train=True),
            digits.Digits(train=False),
            [str(digit) for digit in range(digits.CLASSES)],
            digits.DATA_CONFIG,
            digits.AUGMENTATION,
        )
    if config.data_dir is None:
        raise CommandError(f"--dataset {config.dataset} needs --data-dir: nothing is downloaded")
    root = Path(config.data_dir)
    if not root.is_dir():
        raise CommandError(f"--data-dir {root}: no such folder")
    if config.dataset is None:
        return _open_images(config, root)
    if not config.dataset.lower().startswith(_TORCH):
        raise CommandError(
            f"--dataset {config.dataset}: expected torch/NAME, such as torch/cifar10, or no"
            " --dataset for a folder or tar of images. Streams do not work: they have no fixed"
            " order, so a run could not resume"
        )
    return _open_torchvision(config, config.dataset, root)


def _open_images(config: TrainConfig, root: Path) -> Datasets:
    train_path = find_split(root, "--train-split", config.train_split, TRAIN_NAMES)
    path = find_split(root, "--val-split", config.val_split, VALIDATION_NAMES)
    train, labels, of_train = open_split(train_path)
    validation, _, of_validation = open_split(path, labels)
    left_out = {train_path: of_train, path: of_validation}
    return Datasets(train, validation, list(labels), {}, _AUGMENTATION, left_out)


def _open_torchvision(config: TrainConfig, name: str, root: Path) -> Datasets:
    train = _open_part(name, root, "--train-split", config.train_split)
    validation = _open_part(name, root, "--val-split", config.val_split)
    # timm reads any name except "train" and its synonyms as the test images of such a dataset.
    if not getattr(train, "train", True):
        raise CommandError(
            f"--train-split {config.train_split}: these are not the training images of {name};"
            " use train"
        )
    classes = getattr(train, "classes", None)
    if classes is None and config.num_classes is None:
        raise CommandError(f"--dataset {name} does not list its classes: give --num-classes")
    if classes != getattr(validation, "classes", None):
        raise CommandError(f"--dataset {name}: its training and validation classes differ")
    names = classes if classes is not None else range(config.num_classes or 0)
    return Datasets(
        _Images(train), _Images(validation), [str(name) for name in names], {}, _AUGMENTATION
    )


def _open_part(name: str, root: Path, flag: str, split: str) -> Any:
    try:
        return create_dataset(name, root=str(root), split=split, download=False)
    except Exception as error:
        # timm asserts that it knows the name; torchvision raises any error of reading a file.
        raise CommandError(f"--dataset {name}, {flag} {split}, in {root}: {error}") from error


class _Images(Dataset[tuple[Any, int]]):
    """A torchvision dataset whose images are all RGB, as in timm's own datasets."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.labels = getattr(dataset, "targets", None)
        self.transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._dataset[index]
        image = to_rgb(image)
        return (image if self.transform is None else self.transform(image)), int(label)

    def __len__(self) -> int:
        return len(self._dataset)
