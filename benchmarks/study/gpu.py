"""The large grid, for a GPU: all of CIFAR-10, up to 100 epochs, with rows of the small grid."""

from typing import Any

from benchmarks.study.data import CLASSES
from benchmarks.study.rows import STEPS, core_rows
from benchmarks.study.task import Task

__all__ = ["GPU"]

_FLAGS: dict[str, Any] = {
    "img_size": 64,
    "batch_size": 256,
    "validation_batch_size": 500,
    "workers": 8,
    "channels_last": True,
    "amp": True,
    "scale": (0.35, 1.0),
    "reprob": 0.1,
    "opt": "sgd",
    "lr": 0.2,
    "warmup_epochs": 2,
    "weight_decay": 5e-4,
    "schedule": "none",
    "epochs": 100,
    # The study asks what the layers learn; `python -m benchmarks` measures time.
    "gate": False,
}
# 54 channels instead of 64, and so on, save as much arithmetic as half of the steps at 0.8: 27 %.
_NARROW = {"model_kwargs": {"channels": (54, 108, 216, 432)}}
_DROPOUT = {"model_kwargs": {"drop_rate": 0.1}}


def _task(model: str, epochs: int, fewer: tuple[int, ...]) -> Task:
    return Task(
        name=f"{model}-{epochs}",
        about=f"{model} from scratch, all 50,000 images of CIFAR-10 at 64x64, {epochs} epochs,"
        " augmentation.",
        flags={**_FLAGS, "model": model, "epochs": epochs},
        classes=CLASSES,
        per_class=5000,
        settings={
            **core_rows(epochs, fewer, _NARROW, _DROPOUT),
            "steps-0.5": {"schedule": "bar:rate=0.5,period=2"},
            "steps-0.8-l2_weight": {**STEPS, "score": "l2_weight"},
            "epochs-0.8": {"schedule": "bar:rate=0.8,period=2ep"},
            "no-augmentation": {"aug": False},
            "no-augmentation-steps-0.8": {**STEPS, "aug": False},
        },
    )


_START = Task(
    name="start",
    about="ResNet-18 on six classes, 30 epochs: the start of fine-tuning.",
    flags={**_FLAGS, "model": "resnet18", "epochs": 30},
    classes=CLASSES[:6],
    per_class=5000,
    settings={"resnet18-six-classes": {}},
)
_FINE_TUNING = Task(
    name="resnet18-fine-tuning",
    about="ResNet-18, trained on six classes, learns the other four, 1000 images each, 10 epochs,"
    " augmentation.",
    flags={**_FLAGS, "model": "resnet18", "epochs": 10, "warmup_epochs": 0, "lr": 0.02},
    classes=CLASSES[6:],
    per_class=1000,
    start="resnet18-six-classes",
    settings={
        name: flags
        for name, flags in core_rows(10, (8, 6, 4), _NARROW, _DROPOUT).items()
        if name != "narrow"
    },
)

GPU = (
    _START,
    _FINE_TUNING,
    _task("resnet18", 30, (24, 20, 14)),
    _task("resnet18", 100, (80, 66, 46)),
    _task("resnet50", 100, (80, 66, 46)),
)
