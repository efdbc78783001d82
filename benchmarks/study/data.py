"""Small parts of CIFAR-10 as folders of images, which `ssprop-fx train` reads."""

import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["CLASSES", "unpack"]

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# Images per class for validation after each epoch; the result uses all test images, once.
_VALIDATION = 10


def unpack(archive: Path, folder: Path, classes: Sequence[str], per_class: int) -> Path:
    """Unpack the first training images and all test images of some classes.

    Args:
        archive: zip of `train/CLASS/NNNN.jpg` and `test/CLASS/NNNN.jpg`.
        folder: folder for unpacked parts; a part that exists is reused.
        classes: names of the classes.
        per_class: training images of each class.

    Returns:
        A folder with `train`, `test` and `validation`; `validation` holds a few images of `test`.

    Raises:
        ValueError: the archive has too few images of a class.
    """
    found = folder / f"cifar10-{'-'.join(classes)}-{per_class}"
    if found.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as images, tempfile.TemporaryDirectory(dir=folder) as temporary:
        names = sorted(images.namelist())
        for split, source, count in (
            ("train", "train", per_class),
            ("test", "test", None),
            ("validation", "test", _VALIDATION),
        ):
            for name in classes:
                members = [member for member in names if member.startswith(f"{source}/{name}/")]
                needed = per_class if split == "train" else 1
                if len(members) < needed:
                    raise ValueError(
                        f"{archive}: {len(members)} images in {source}/{name}, {needed} needed"
                    )
                target = Path(temporary) / split / name
                target.mkdir(parents=True)
                for member in members[:count]:
                    (target / Path(member).name).write_bytes(images.read(member))
        # Copy, then rename below, so that the folder is complete or absent.
        shutil.copytree(temporary, f"{found}.partial", dirs_exist_ok=True)
    Path(f"{found}.partial").rename(found)
    return found
