"""CIFAR-10 in the memory of a GPU: packed for the way, decoded once, augmented in batches there."""

import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from benchmarks.study.data import CLASSES

__all__ = ["Images", "digits", "load", "pack"]

# Mean and standard deviation of CIFAR-10's training images.
_MEAN, _STD = 0.473, 0.251
# Training images move by up to this many pixels.
_SHIFT = 4
_DIGITS_SIZE, _DIGITS_TRAIN = 16, 1280


@dataclass(frozen=True)
class Images:
    """All images of a data set, on one device.

    Attributes:
        train: uint8 [N, 3, H, W].
        train_labels: int64 [N].
        test: uint8 [M, 3, H, W].
        test_labels: int64 [M].
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def to(self, device: str) -> "Images":
        """Return the images on a device."""
        return Images(*(value.to(device) for value in vars(self).values()))

    def epoch(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield whole batches of the training images, shuffled, flipped and moved.

        Nothing waits for the device. Random numbers come from its default generator.

        Args:
            batch_size: images in a batch.

        Yields:
            Images, normalised, float32 [batch_size, 3, H, W] in channels_last; their labels.
        """
        count, _, height, width = self.train.shape
        padded = functional.pad(self.train.float(), [_SHIFT] * 4, mode="reflect").byte()
        order = torch.randperm(count, device=self.train.device)
        for batch in order.split(batch_size)[: count // batch_size]:
            yield self._normal(_moved(padded, batch, height, width)), self.train_labels[batch]

    def tests(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all test images in order, like `epoch`; the last batch may be smaller."""
        for images, labels in zip(
            self.test.split(batch_size), self.test_labels.split(batch_size), strict=True
        ):
            yield self._normal(images), labels

    def _normal(self, images: Tensor) -> Tensor:
        normal: Tensor = (images.float() / 255 - _MEAN) / _STD
        return normal.contiguous(memory_format=torch.channels_last)


def _moved(padded: Tensor, batch: Tensor, height: int, width: int) -> Tensor:
    """Return a random window of each image, [B, 3, height, width], half of them flipped."""
    device, count = padded.device, len(batch)
    top, left = torch.randint(0, 2 * _SHIFT + 1, (2, count, 1), device=device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, -1)
    flipped = torch.rand(count, 1, device=device) < 0.5
    columns = left + torch.where(flipped, width - 1 - columns, columns)
    channels = torch.arange(3, device=device).view(1, 3, 1, 1)
    return padded[batch.view(-1, 1, 1, 1), channels, rows[:, None, :, None], columns[:, None, None]]


def pack(archive: Path, path: Path) -> None:
    """Write all images of a zip as one file, without the overhead of a zip for each.

    Args:
        archive: zip of `train/CLASS/NNNN.jpg` and `test/CLASS/NNNN.jpg`.
        path: the file.

    Raises:
        ValueError: the archive has no such images.
    """
    found: list[bytes] = []
    labels: list[int] = []
    counts: list[int] = []
    with zipfile.ZipFile(archive) as images:
        names = sorted(images.namelist())
        for split in ("train", "test"):
            for label, name in enumerate(CLASSES):
                members = [n for n in names if n.startswith(f"{split}/{name}/")]
                if not members:
                    raise ValueError(f"{archive} has no images in {split}/{name}")
                found += [images.read(member) for member in members]
                labels += [label] * len(members)
            counts.append(len(labels))
    content = {
        "jpegs": torch.from_numpy(np.frombuffer(b"".join(found), np.uint8).copy()),
        "sizes": torch.tensor([len(jpeg) for jpeg in found]),
        "labels": torch.tensor(labels, dtype=torch.uint8),
        "train": counts[0],
    }
    torch.save(content, path)


def load(path: Path) -> Images:
    """Decode the file that `pack` wrote."""
    content = torch.load(path, weights_only=True)
    jpegs = [part.numpy().tobytes() for part in content["jpegs"].split(content["sizes"].tolist())]
    with ThreadPoolExecutor() as pool:
        decoded = np.stack(list(pool.map(_decode, jpegs)))
    images = torch.from_numpy(decoded).permute(0, 3, 1, 2).contiguous()
    labels, train = content["labels"].long(), content["train"]
    return Images(images[:train], labels[:train], images[train:], labels[train:])


def digits() -> Images:
    """Return scikit-learn's digits as colour images, for a rehearsal."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] * (255 / 16)
    images = functional.interpolate(images, (_DIGITS_SIZE, _DIGITS_SIZE)).expand(-1, 3, -1, -1)
    images, labels = images.byte().contiguous(), torch.tensor(found.target)
    train = _DIGITS_TRAIN
    return Images(images[:train], labels[:train], images[train:], labels[train:])


def _decode(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
