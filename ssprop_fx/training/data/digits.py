"""Digits: a small dataset of real images that needs no download."""

from typing import Any

from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset

__all__ = ["AUGMENTATION", "CLASSES", "DATA_CONFIG", "Digits"]

CLASSES = 10
DATA_CONFIG: dict[str, Any] = {
    "input_size": (3, 64, 64),
    "mean": (0.305,) * 3,
    "std": (0.376,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
# A mirrored digit is not a digit, and a crop of a twelfth (timm's default) fits any digit.
AUGMENTATION: dict[str, Any] = {
    "scale": (0.7, 1.0),
    "ratio": (0.9, 1.1),
    "hflip": 0.0,
    "color_jitter": 0.0,
    "interpolation": "bilinear",
}


class Digits(Dataset[tuple[Any, int]]):
    """Scikit-learn's handwritten digits: 1797 scans of 8x8 pixels, 10 classes.

    Args:
        train: True for the training part (1437 images), False for the validation part (360). The
            split is stratified and always the same.
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
        self.labels = [int(label) for label in labels]
        self.transform: Any = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self._images[index]
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def __len__(self) -> int:
        return len(self.labels)
