"""Image folders and tars: which files are images of which class, and what is left out.

A class is a folder that holds images, and its name is the class. Folders above it only group.
"""

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from timm.data.readers.img_extensions import get_img_extensions

from ssprop_fx.training.errors import CommandError

__all__ = ["Files", "LeftOut", "class_names", "label_files", "list_folder", "shorten"]

_OTHER_EXTENSION = "not {}"
_OUTSIDE = "outside of class folders"
_HIDDEN = "hidden"
_MACOS = "of macOS"
_EMPTY = "folders without images"
_NO_FILE = "broken links or no files"
_LOOP = "links to a folder around them"
_EXAMPLES = 3


@dataclass
class LeftOut:
    """Paths that are no images of a class, by reason."""

    paths: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def add(self, reason: str, path: str) -> None:
        """Note a path; the same path counts once."""
        self.paths[reason].add(path)

    def __str__(self) -> str:
        parts = []
        for reason, paths in self.paths.items():
            shown = sorted(paths)[:_EXAMPLES]
            dots = ", ..." if len(paths) > _EXAMPLES else ""
            parts.append(f"{reason}: {len(paths)} ({', '.join(shown)}{dots})")
        return "; ".join(parts)

    def __bool__(self) -> bool:
        return bool(self.paths)


@dataclass(frozen=True)
class Files:
    """The images of a split.

    Attributes:
        names: their paths below the split's folder, with `/`, in natural order.
        classes: the class of each, as a name.
        left_out: what else is there.
    """

    names: list[str]
    classes: list[str]
    left_out: LeftOut


def list_folder(root: Path) -> tuple[list[str], LeftOut]:
    """Return the paths of all files below a folder, with `/`, and what was not looked at.

    Links are followed, but not to a folder that the link is in, which would never end.

    Raises:
        CommandError: a folder cannot be read.
    """
    names: list[str] = []
    left_out = LeftOut()
    folders = [("", frozenset[str]())]
    extensions = get_img_extensions(as_set=True)
    while folders:
        prefix, above = folders.pop()
        path = os.path.realpath(root / prefix)
        if path in above:
            left_out.add(_LOOP, prefix)
            continue
        holds_image = holds_folder = False
        for name, is_folder, is_file in _scan(root / prefix):
            whole = f"{prefix}/{name}" if prefix else name
            if is_folder and not _set_aside(whole, left_out):
                holds_folder = True
                folders.append((whole, above | {path}))
            elif is_file:
                names.append(whole)
                holds_image |= _extension(name) in extensions
            elif not is_folder:  # a broken link, or a device such as a pipe, which would block
                left_out.add(_NO_FILE, whole)
        if prefix and not holds_image and not holds_folder:
            left_out.add(_EMPTY, prefix)
    return names, left_out


def label_files(root: Path, names: Iterable[str], left_out: LeftOut) -> Files:
    """Find the images among files, and their classes.

    Args:
        root: folder or tar of the split, for messages.
        names: paths of files below it.
        left_out: gets the others.

    Raises:
        CommandError: two folders of one name hold images, or a folder and one inside it.
    """
    images = []
    extensions = get_img_extensions()
    for name in names:
        path = posixpath.normpath(name)
        if _set_aside(path, left_out):
            continue
        if _extension(path) not in extensions:
            left_out.add(_OTHER_EXTENSION.format(" or ".join(extensions)), path)
        elif "/" not in path:
            left_out.add(_OUTSIDE, path)
        else:
            images.append((path, name))
    _check_folders(root, {posixpath.dirname(path) for path, _ in images})
    images.sort(key=lambda image: _natural_order(image[0]))
    classes = [posixpath.basename(posixpath.dirname(path)) for path, _ in images]
    return Files([name for _, name in images], classes, left_out)


def class_names(root: Path, files: Files, known: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return class -> label of a split.

    Args:
        root: folder or tar of the split, for messages.
        files: its images.
        known: the classes of the training images, for another split; None for those themselves.

    Raises:
        CommandError: there are no images, fewer than two classes, or classes that are not known.
    """
    also = f"; left out: {files.left_out}" if files.left_out else ""
    right = f"right would be {root}/CLASS/IMAGE.jpg"
    found = sorted(set(files.classes), key=_natural_order)
    if not found:
        raise CommandError(f"{root}: no images found; {right}{also}")
    if known is not None:
        strange = [name for name in found if name not in known]
        if strange:
            raise CommandError(
                f"{root}: {shorten(strange)} {'is' if len(strange) == 1 else 'are'} not among the"
                f" training classes, {shorten(known)}{also}"
            )
        return dict(known)
    if len(found) < 2:
        raise CommandError(
            f"{root}: all {len(files.names)} images are of one class, {found[0]}, and training"
            f" needs two; {right}{also}"
        )
    return {name: label for label, name in enumerate(found)}


def shorten(names: Iterable[str], most: int = 8) -> str:
    """Return names with commas, at most so many."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _scan(folder: Path) -> Iterable[tuple[str, bool, bool]]:
    try:
        with os.scandir(folder) as entries:
            return [(entry.name, *_kind(entry)) for entry in entries]
    except OSError as error:
        raise CommandError(f"{folder}: {error.strerror}") from error


def _kind(entry: "os.DirEntry[str]") -> tuple[bool, bool]:
    try:
        return entry.is_dir(), entry.is_file()
    except OSError:  # a link to itself
        return False, False


def _natural_order(name: str) -> tuple[list[int | str], str]:
    """Return a sort key that puts a9 before a10, and no two names in the same place."""
    # timm's key has ties, such as Cat and cat, or 1 and 01: their order, and so the labels, would
    # depend on Python's hash seed.
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _extension(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def _set_aside(path: str, left_out: LeftOut) -> bool:
    """Note a path that is hidden or in a hidden folder, or in what macOS adds to archives."""
    parts = path.split("/")
    for count, part in enumerate(parts, start=1):
        reason = _MACOS if part == "__MACOSX" else _HIDDEN if part.startswith(".") else None
        if reason is not None:
            left_out.add(reason, "/".join(parts[:count]))
            return True
    return False


def _check_folders(root: Path, folders: set[str]) -> None:
    rule = f"a class is one folder with images: right would be {root}/CLASS/IMAGE.jpg"
    named = Counter(map(posixpath.basename, folders))
    name, count = max(named.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        same = sorted(path for path in folders if posixpath.basename(path) == name)
        raise CommandError(f"{root}: {count} folders are called {name}: {shorten(same, 3)}; {rule}")
    for folder in sorted(folders):
        above = posixpath.dirname(folder)
        while above and above not in folders:
            above = posixpath.dirname(above)
        if above:
            raise CommandError(f"{root}: {above} holds images, and so does {folder}; {rule}")
