"""What the splits of a run hold, and whether a resumed run finds the same."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ssprop_fx.training.data.datasets import Datasets
from ssprop_fx.training.data.folders import shorten
from ssprop_fx.training.errors import CommandError

__all__ = ["check_same_data", "describe_classes", "describe_data"]

_SPLITS = ("train", "validation")


def describe_data(datasets: Datasets, steps_per_epoch: int) -> dict[str, Any]:
    """Return what a checkpoint keeps of the data, as plain values.

    Args:
        datasets: the datasets of the run.
        steps_per_epoch: number of steps of its epochs.
    """
    splits = {}
    for name in _SPLITS:
        dataset = getattr(datasets, name)
        counts = _counts(dataset, datasets.num_classes)
        splits[name] = {"images": len(dataset), "counts": counts, "files": _fingerprint(dataset)}
    return {"classes": list(datasets.classes), "steps_per_epoch": steps_per_epoch, **splits}


def check_same_data(saved: Mapping[str, Any], datasets: Datasets, *, changed: bool) -> int:
    """Check that a run finds the data that it had.

    Args:
        saved: the result of `describe_data` in the checkpoint.
        datasets: the datasets now.
        changed: whether other images of the same classes are right.

    Returns:
        Number of steps of an epoch, which does not change: schedules count in steps.

    Raises:
        CommandError: the classes are others, or the images are and `changed` is False.
    """
    now = describe_data(datasets, saved["steps_per_epoch"])
    _check_classes(saved["classes"], now["classes"])
    for name in _SPLITS:
        if saved[name] != now[name] and not changed:
            raise CommandError(
                f"--resume: the {name} images are not those of the run:"
                f" {_difference(saved[name], now[name], now['classes'])}; bring them back, or go"
                " on with these: --changed-data"
            )
    return int(saved["steps_per_epoch"])


def describe_classes(datasets: Datasets) -> list[str]:
    """Return a line for each split: its images and how many of them each class has."""
    lines = []
    for name in _SPLITS:
        dataset = getattr(datasets, name)
        counts = _counts(dataset, datasets.num_classes)
        text = f"{name}: {len(dataset)} images"
        if counts:
            pairs = zip(datasets.classes, counts, strict=True)
            each = [f"{label} {count}" for label, count in pairs if count]
            text += f", {len(each)} classes: {shorten(each, 10)}"
        lines.append(text)
    return lines


def _check_classes(before: list[str], now: list[str]) -> None:
    if before == now:
        return
    differences = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
    }
    told = [f"{word}: {shorten(names)}" for word, names in differences.items() if names]
    raise CommandError(
        f"--resume: the classes are not those of the run ({'; '.join(told) or 'another order'}),"
        " so its labels would mean something else: bring them back or start a new run"
    )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], classes: list[str]) -> str:
    if before["images"] != now["images"]:
        return f"{before['images']} then, {now['images']} now"
    for name, then, count in zip(classes, before["counts"], now["counts"], strict=False):
        if then != count:
            return f"{name} had {then} and has {count}"
    return "their names differ"


def _counts(dataset: Any, num_classes: int) -> list[int]:
    """Return the number of images of each class; empty if the dataset does not tell."""
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return []
    count = Counter(map(int, labels))
    return [count[label] for label in range(num_classes)]


def _fingerprint(dataset: Any) -> str:
    """Return a hash of the names and labels of a dataset, in its order."""
    # Not of the files' content: reading it all would take as long as an epoch.
    total = hashlib.sha256()
    names = getattr(dataset, "names", None) or range(len(dataset))
    labels = getattr(dataset, "labels", None)
    for index, name in enumerate(names):
        total.update(f"{name}\t{'' if labels is None else int(labels[index])}\n".encode())
    return total.hexdigest()
