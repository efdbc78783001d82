"""The datasets of a run: scikit-learn's digits, images in folders or tars, or torchvision."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from torch.utils.data import Dataset

from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data import digits
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
_TRAIN_NAMES = ("train", "training")
_VALIDATION_NAMES = ("validation", "val", "valid", "eval", "test")


@dataclass(frozen=True)
class Datasets:
    """The two datasets of a run, and settings for their loaders.

    Attributes:
        train: training images and labels.
        validation: validation images and labels.
        num_classes: number of classes in the training dataset.
        data_config: settings that replace the model's own, as in `timm.data.resolve_data_config`.
        augmentation: settings of timm's training transform.
    """

    train: Any
    validation: Any
    num_classes: int
    data_config: dict[str, Any]
    augmentation: dict[str, Any]


def create_datasets(config: TrainConfig) -> Datasets:
    """Open the datasets that `config` names.

    Raises:
        CommandError: the dataset is unknown, is not in `config.data_dir`, or does not fit.
    """
    if config.dataset is None and config.data_dir is None:
        return Datasets(
            digits.Digits(train=True),
            digits.Digits(train=False),
            digits.CLASSES,
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
    train = _read(_find_split(root, "--train-split", config.train_split, _TRAIN_NAMES))
    # timm's reader of tars uses the second name.
    names = ("class_to_idx", "class_name_to_idx")
    class_map = next(getattr(train.reader, name) for name in names if hasattr(train.reader, name))
    path = _find_split(root, "--val-split", config.val_split, _VALIDATION_NAMES)
    return Datasets(train, _read(path, class_map), len(class_map), {}, _AUGMENTATION)


def _find_split(root: Path, flag: str, name: str, synonyms: tuple[str, ...]) -> Path:
    # timm falls back to the root folder, which would train and validate on the same images.
    names = (name, *synonyms) if name in synonyms else (name,)
    for candidate in names:
        for path in (root / candidate, root / f"{candidate}.tar"):
            if path.is_dir() or path.is_file():
                return path
    present = sorted(
        path.name for path in root.iterdir() if path.is_dir() or path.suffix == ".tar"
    )[:8]
    raise CommandError(
        f"{flag} {name}: no folder or tar named {' or '.join(dict.fromkeys(names))} in {root};"
        f" it has {', '.join(present) if present else 'no folders'}"
    )


def _read(path: Path, class_map: dict[str, int] | None = None) -> Any:
    try:
        dataset = create_dataset("", root=str(path), search_split=False, class_map=class_map)
        if len(dataset):
            return dataset
    except RuntimeError:
        pass
    raise CommandError(
        f"{path}: no images found; expected {path}/CLASS/IMAGE.jpg"
        + (", with the classes of the training images" if class_map else "")
    )


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
    num_classes = len(classes) if classes is not None else config.num_classes or 0
    return Datasets(_Images(train), _Images(validation), num_classes, {}, _AUGMENTATION)


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
        self.transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._dataset[index]
        image = image.convert("RGB")
        return (image if self.transform is None else self.transform(image)), int(label)

    def __len__(self) -> int:
        return len(self._dataset)
