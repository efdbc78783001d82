"""The splits of a dataset of images: one folder or one tar for each."""

import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from timm.data.readers import create_reader

from ssprop_fx.training.data.folders import (
    Files,
    LeftOut,
    class_names,
    label_files,
    list_folder,
)
from ssprop_fx.training.data.images import ImageFiles, check_readable
from ssprop_fx.training.errors import CommandError

__all__ = ["TRAIN_NAMES", "VALIDATION_NAMES", "find_split", "open_split"]

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("validation", "val", "valid", "eval", "test")


def find_split(root: Path, flag: str, name: str, synonyms: tuple[str, ...]) -> Path:
    """Return the folder or tar of a split.

    Args:
        root: folder of the dataset.
        flag: the flag that names the split.
        name: its name.
        synonyms: other names for the same split, if `name` is among them.

    Raises:
        CommandError: there is none.
    """
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


def open_split(
    path: Path, known: Mapping[str, int] | None = None
) -> tuple[ImageFiles, dict[str, int], LeftOut]:
    """Open the images of a split.

    Args:
        path: its folder or tar.
        known: class -> label of the training images; None finds the classes.

    Returns:
        The images, class -> label, and what is no image of a class.

    Raises:
        CommandError: the images are not in class folders, a class has no image that can be read,
            or the classes do not fit.
    """
    if path.is_dir():
        files = label_files(path, *list_folder(path))
        reader: _FolderReader | _TarReader = _FolderReader(path, files.names)
    else:
        files, reader = _open_tar(path)
    labels = class_names(path, files, known)
    images = ImageFiles(path, files.names, [labels[name] for name in files.classes], reader)
    check_readable(images, list(labels))
    return images, labels, files.left_out


@dataclass(frozen=True)
class _FolderReader:
    root: Path
    names: Sequence[str]

    def __call__(self, index: int) -> IO[bytes]:
        return open(self.root / self.names[index], "rb")


@dataclass(frozen=True)
class _TarReader:
    reader: Any
    indices: Sequence[int]

    def __call__(self, index: int) -> IO[bytes]:
        file: IO[bytes] = self.reader[self.indices[index]][0]
        return file


def _open_tar(path: Path) -> tuple[Files, _TarReader]:
    try:
        with tarfile.open(path) as tar:
            members = [member.name for member in tar if member.isfile()]
        # Loader workers would share an open tar, and with it the place where they read.
        reader = create_reader("", root=str(path), cache_tarfiles=False)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise CommandError(f"{path}: not a tar, or a damaged one: {error}") from error
    except ValueError:
        # timm's reader cannot be made without images.
        return label_files(path, members, LeftOut()), _TarReader(None, ())
    indices = {_name_in_tar(*sample): index for index, sample in enumerate(reader.samples)}
    names = [*indices, *(name for name in members if not name.endswith(".tar"))]
    files = label_files(path, dict.fromkeys(names), LeftOut())
    return files, _TarReader(reader, [indices[name] for name in files.names])


def _name_in_tar(image: Any, parent: str | None, inner_tar: Any) -> str:
    """Return the path of an image in a tar, or in a tar inside it, which counts as a folder."""
    if inner_tar is None:
        return str(image.path)
    folder = posixpath.splitext(posixpath.basename(inner_tar.name))[0]
    return posixpath.join(folder, str(image.path))
