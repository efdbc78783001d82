"""Folders of tiny images, whose colour says of which class they are."""

import os
import tarfile
import zlib

import numpy as np
from PIL import Image

SIZE = 8


def colour(name):
    """Return the colour of a class: channels in 64, 65, ..., 255."""
    return tuple(64 + (zlib.crc32(f"{name}{channel}".encode()) % 192) for channel in range(3))


def save_image(path, name, size=SIZE):
    """Save an image of the class `name`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size, size, 3), colour(name), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def save_classes(folder, **counts):
    """Save a folder with so many images of each class."""
    for name, count in counts.items():
        for index in range(count):
            save_image(folder / name / f"{index}.png", name)


def pack(folder):
    """Pack a folder into a tar next to it, without the folder's own name."""
    with tarfile.open(f"{folder}.tar", "w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                tar.add(path, path.relative_to(folder))


def link(path, target):
    """Make a link, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, path)


def classes_of(dataset, names):
    """Return how many images of each class a dataset has, by what their pixels show.

    Raises:
        AssertionError: the label of an image is not that of its colour.
    """
    found = dict.fromkeys(names, 0)
    for index in range(len(dataset)):
        image, label = dataset[index]
        assert image.getpixel((0, 0)) == colour(names[label]), (index, names[label])
        found[names[label]] += 1
    return {name: count for name, count in found.items() if count}
