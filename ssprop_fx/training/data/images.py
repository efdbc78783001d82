"""Datasets of image files: decoding, and what happens to files that cannot be read."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ssprop_fx.training.errors import CommandError, UnreadableError, first_line

__all__ = ["ImageFiles", "check_readable", "to_rgb"]

_logger = logging.getLogger(__name__)

# As in timm: more of them in a row is a broken disk, or a folder that is no image folder.
_MOST_IN_A_ROW = 10


class ImageFiles(Dataset[tuple[Any, int]]):
    """Images of a folder or tar.

    An image that cannot be read is replaced by the next one, with a warning that names it.

    Args:
        root: the folder or tar.
        names: the paths of the images in it.
        labels: their labels.
        open_file: opens the image of an index; loader workers share what it holds.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        labels: Sequence[int],
        open_file: Callable[[int], IO[bytes]],
    ) -> None:
        self.root = root
        self.names = names
        self.labels = labels
        self.transform: Any = None
        self._open = open_file
        self._told: set[int] = set()

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for offset in range(_MOST_IN_A_ROW):
            at = (index + offset) % len(self.names)
            try:
                image = self.read(at)
                break
            except Exception as error:
                # PIL raises OSError, SyntaxError, ValueError and more for a damaged file.
                self._warn(at, error)
                last = error
        else:
            raise UnreadableError(
                f"{_MOST_IN_A_ROW} images in a row cannot be read, the last one is"
                f" {self.root / self.names[at]}: {_reason(last)}"
            ) from last
        return (image if self.transform is None else self.transform(image)), self.labels[at]

    def __len__(self) -> int:
        return len(self.names)

    def _warn(self, index: int, error: Exception) -> None:
        if index not in self._told:
            self._told.add(index)
            path = self.root / self.names[index]
            _logger.warning(
                "%s cannot be read, the next image replaces it: %s", path, _reason(error)
            )

    def read(self, index: int) -> Image.Image:
        """Read an image, as RGB."""
        with self._open(index) as file:
            return to_rgb(Image.open(file))


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as RGB, with 8 bits a channel."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL would make every value above 255 white. It keeps the high byte of other 16-bit images.
        high = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def check_readable(dataset: ImageFiles, classes: Sequence[str]) -> None:
    """Check that each class of a dataset has an image that can be read.

    Raises:
        CommandError: a class has none.
    """
    indices = defaultdict(list)
    for index, label in enumerate(dataset.labels):
        indices[label].append(index)
    for label, members in indices.items():
        errors = _errors(dataset, members)
        if len(errors) == len(members):
            raise CommandError(
                f"{dataset.root}: no image of class {classes[label]} can be read, such as"
                f" {dataset.names[members[0]]}: {_reason(errors[0])}"
            )


def _reason(error: Exception) -> str:
    # PIL ends its message with the open file, which is no news.
    return first_line(error).split(" <")[0]


def _errors(dataset: ImageFiles, indices: Sequence[int]) -> list[Exception]:
    """Return the errors of reading images up to the first that can be read."""
    errors = []
    for index in indices:
        try:
            dataset.read(index)
            break
        except Exception as error:
            errors.append(error)
    return errors
