"""The small grid: one or two hours on one core."""

from typing import Any

from benchmarks.study.data import CLASSES
from benchmarks.study.rows import (
    SAMPLES,
    STEPS,
    WEIGHT,
    adaptive_rows,
    core_rows,
    early,
    late,
)
from benchmarks.study.task import Task

__all__ = ["SMALL"]

# All layers take part, even if they gain no time, at the published code's keep counts, because the
# study asks what they learn.
_SMALL: dict[str, Any] = {
    "model": "study_resnet",
    "img_size": 32,
    "batch_size": 32,
    "validation_batch_size": 500,
    "scale": (0.5, 1.0),
    "color_jitter": 0.0,
    "train_interpolation": "bilinear",
    "opt": "sgd",
    "lr": 0.05,
    "weight_decay": 5e-4,
    "smoothing": 0.0,
    "schedule": "none",
    # The default at the time of most runs.
    "score": "mean_abs",
    "gate": False,
    "min_channels": 1,
    "channel_multiple": 1,
}

# 27 channels instead of 32 save as much arithmetic as half of the steps at 0.8: 27 %.
_NARROW = {"model_kwargs": {"width": 27}}
_DROPOUT = {"model_kwargs": {"drop_rate": 0.1}}

_SHORT = Task(
    name="short",
    about="From scratch, 2400 images of CIFAR-10, 5 epochs, augmentation: stopping earlier costs"
    " accuracy at once.",
    flags={**_SMALL, "epochs": 5},
    classes=CLASSES,
    per_class=240,
    settings={
        **core_rows(5, (4, 3, 2), _NARROW, _DROPOUT),
        "samples-0.5-random": {**SAMPLES, "select": "random"},
        "steps-0.5": {"schedule": "bar:rate=0.5,period=2"},
        "steps-0.8-l2_weight": {**STEPS, "score": "l2_weight"},
        "first-layers-0.8": {
            "schedule": "constant:rate=0.8",
            "rates": {"layer2.*": 0, "layer3.*": 0},
        },
        "last-layers-0.8": {
            "schedule": "constant:rate=0.8",
            "rates": {"stem.*": 0, "layer1.*": 0},
        },
        "late-0.8": late(2.5),
        "weight-0.8-random": {**WEIGHT, "select": "random"},
        "weight-0.8-sampled": {**WEIGHT, "select": "sampled", "score": "l2"},
        "epochs-0.8": {"schedule": "bar:rate=0.8,period=2ep"},
        "cosine-up-0.8": {"schedule": "cosine:start=0,end=0.8,steps=5ep"},
        "cosine-down-0.8": {"schedule": "cosine:start=0.8,end=0,steps=5ep"},
        "warmup-0.5": {"schedule": "constant:rate=0.5", "sparsity_warmup_epochs": 1},
        "constant-0.5": {"schedule": "constant:rate=0.5"},
        "constant-0.8": {"schedule": "constant:rate=0.8"},
        "steps-0.8-l2": {**STEPS, "score": "l2"},
        "steps-0.8-sampled": {**STEPS, "select": "sampled", "score": "l2"},
        "steps-0.8-memory": {**STEPS, "memory": 0.9},
        **adaptive_rows(),
        "lr-0.1": {"lr": 0.1},
        "lr-0.1-4ep": {"lr": 0.1, "epochs": 4},
        "lr-0.1-steps-0.8": {**STEPS, "lr": 0.1},
        "lr-0.1-early-0.8": {**early(2.5), "lr": 0.1},
    },
)


_LONG = Task(
    name="long",
    about="From scratch, 800 images of CIFAR-10, 20 epochs, augmentation: few images, seen often.",
    flags={**_SMALL, "epochs": 20},
    classes=CLASSES,
    per_class=80,
    settings=core_rows(20, (15, 10, 6), _NARROW, _DROPOUT),
)
_OVERFIT = Task(
    name="no-augmentation",
    about="The images and epochs of `long`, without augmentation: the network learns the images by"
    " heart.",
    flags={**_SMALL, "epochs": 20, "aug": False},
    classes=CLASSES,
    per_class=80,
    settings=core_rows(20, (15, 10, 6), _NARROW, _DROPOUT),
)
_START = Task(
    name="start",
    about="Six classes, 400 images each, 10 epochs: the start of fine-tuning.",
    flags={**_SMALL, "epochs": 10},
    classes=CLASSES[:6],
    per_class=400,
    settings={"six-classes": {}, "six-classes-narrow": _NARROW},
)
_FINE_TUNED = core_rows(8, (6, 4, 2), _NARROW, _DROPOUT)


def _fine_tuning(name: str, about: str, lr: float, settings: dict[str, dict[str, Any]]) -> Task:
    return Task(
        name=name,
        about=about,
        flags={**_SMALL, "epochs": 8, "lr": lr},
        classes=CLASSES[6:],
        per_class=200,
        start="six-classes",
        starts={"narrow": "six-classes-narrow"},
        settings=settings,
    )


_FINE_TUNING = _fine_tuning(
    "fine-tuning",
    "A network trained on six classes learns the other four, 200 images each, 8 epochs,"
    " augmentation, learning rate 0.02.",
    0.02,
    {
        **_FINE_TUNED,
        "steps-0.5": {"schedule": "bar:rate=0.5,period=2"},
        "steps-0.8-l2": {**STEPS, "score": "l2"},
        "constant-0.8": {"schedule": "constant:rate=0.8"},
        "first-layers-0.8": _SHORT.settings["first-layers-0.8"],
        "late-0.8": late(4),
        "samples-0.5-sampled": {**SAMPLES, "select": "sampled", "score": "l2"},
        "samples-0.5-random": {**SAMPLES, "select": "random"},
        "samples-0.8": {**SAMPLES, "schedule": "constant:rate=0.8"},
        "samples-late-0.8": {**late(4), "axis": "sample"},
        **adaptive_rows(),
    },
)
# Settings that were equal to dense training or better.
_BEST = {
    name: _FINE_TUNING.settings[name]
    for name in ("samples-0.5-random", "samples-late-0.8", "late-0.8")
}
_FINE_TUNING_FASTER = _fine_tuning(
    "fine-tuning-faster",
    "The same with twice the learning rate, 0.04.",
    0.04,
    {**_FINE_TUNED, **_BEST},
)
_FINE_TUNING_FASTEST = _fine_tuning(
    "fine-tuning-fastest",
    "The same with four times the learning rate, 0.08.",
    0.08,
    {**_FINE_TUNED, **_BEST},
)
_FINE_TUNING_TOO_FAST = _fine_tuning(
    "fine-tuning-too-fast",
    "Only dense training, at 0.16: is an even higher learning rate better?",
    0.16,
    {name: flags for name, flags in _FINE_TUNED.items() if name.startswith("dense")},
)
_FROM_SCRATCH = Task(
    name="from-scratch",
    about="The classes and epochs of `fine-tuning`, from scratch.",
    flags={**_SMALL, "epochs": 8},
    classes=CLASSES[6:],
    per_class=200,
    settings=_FINE_TUNED,
)
_DIGITS = Task(
    name="digits",
    about="Scikit-learn's digits, 1437 images, 6 epochs, augmentation; needs no data.",
    flags={
        **{name: value for name, value in _SMALL.items() if name not in ("scale", "color_jitter")},
        "epochs": 6,
    },
    settings=core_rows(6, (5, 4, 3), _NARROW, _DROPOUT),
)

SMALL = (
    *(_START, _FINE_TUNING, _FINE_TUNING_FASTER, _FINE_TUNING_FASTEST, _FINE_TUNING_TOO_FAST),
    *(_SHORT, _FROM_SCRATCH, _OVERFIT, _LONG, _DIGITS),
)
