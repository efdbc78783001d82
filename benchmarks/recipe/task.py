"""The tasks: what is trained, on what, and for how long."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import benchmarks.study.model  # noqa: F401  (its model's name becomes known to timm)
from benchmarks.recipe.images import Images, load_images

__all__ = ["TASKS", "Task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all rows of a table have in common.

    Attributes:
        name: name of the table.
        about: what it is, for the page.
        model: name of the timm model.
        data: folder below the data folder, with `train` and `test`.
        size: height and width of the images in pixels.
        images: training images; None for all.
        tests: test images; None for all.
        classes: number of classes.
        epochs: of the full dense run.
        lr: learning rate, with a cosine to 0.
        batch_size: images in a batch.
        weights: whether training starts from ImageNet weights.
        frozen: whether batch norms are in `eval()` mode.
        model_kwargs: further arguments of the model.
        adam: whether the optimizer is AdamW; else SGD with a momentum of 0.9.
        weight_decay: of the optimizer.
        smoothing: label smoothing.
        mixup: alpha of mixup; 0 without.
        fewer: epochs of dense runs that stop earlier.
        pad: pixels of padding for random crops; 0 crops from larger images.
        backend: backend of `torch.compile`.
    """

    name: str
    about: str
    model: str
    data: str
    size: int
    images: int | None = None
    tests: int | None = None
    classes: int
    epochs: int
    lr: float
    batch_size: int = 32
    weights: bool = False
    frozen: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    adam: bool = False
    weight_decay: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    fewer: tuple[float, ...] = ()
    pad: int = 0
    backend: str = "inductor"

    def load(self, data: Path, cache: Path) -> tuple[Images, Images]:
        """Return training and test images."""
        train, test = (
            load_images(data / self.data / split, self.size, cache, self.pad)
            for split in ("train", "test")
        )
        return train.subset(self.images), test.subset(self.tests)

    def build(self, seed: int, weights: Path | None) -> nn.Module:
        """Return the model; the seed decides the weights that are not loaded.

        Args:
            seed: the seed.
            weights: file with ImageNet weights in the order of the model's tensors.

        Raises:
            ValueError: the task starts from weights, and there is no file.
        """
        torch.manual_seed(seed)
        if not self.weights:
            model: nn.Module = timm.create_model(
                self.model, num_classes=self.classes, **self.model_kwargs
            )
            return model.to(memory_format=torch.channels_last)
        if weights is None:
            raise ValueError(f"--weights must name a file: {self.name} starts from it")
        model = timm.create_model(self.model)
        loaded = torch.load(weights, weights_only=True)
        model.load_state_dict(dict(zip(model.state_dict(), loaded.values(), strict=True)))
        reset: Callable[[int], None] = model.reset_classifier  # type: ignore[assignment]
        reset(self.classes)
        return model.to(memory_format=torch.channels_last)


_LITE: dict[str, Any] = {"model": "tf_efficientnet_lite0", "weights": True, "epochs": 6}
_FLOWERS: dict[str, Any] = {"data": "flowers5", "classes": 5, "images": 1600}
_CIFAR: dict[str, Any] = {"data": "cifar10", "classes": 10}
_SMALL: dict[str, Any] = {"size": 64, "images": 5000, "tests": 2000, "frozen": True}
_SMALL |= {"fewer": (3, 4), **_LITE, **_CIFAR}
_SCRATCH: dict[str, Any] = {
    "model": "study_resnet",
    "size": 32,
    "pad": 4,
    "batch_size": 128,
    "epochs": 10,
}
_SCRATCH |= {"lr": 0.1, "weight_decay": 5e-4, "fewer": (7, 8.5)}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="flowers",
            about="EfficientNet-Lite0 from ImageNet weights on 1,600 photographs of five flowers,"
            " 128 pixels, batch norms frozen",
            size=128,
            lr=0.003,
            frozen=True,
            fewer=(3, 4),
            **_LITE,
            **_FLOWERS,
        ),
        Task(
            name="cifar-fine",
            about="EfficientNet-Lite0 from ImageNet weights on 5,000 images of CIFAR-10 at 64"
            " pixels, batch norms frozen",
            lr=0.001,
            **_SMALL,
        ),
        Task(
            name="cifar-fine-edge",
            about="the task `cifar-fine` at three times the learning rate, at which training hardly"
            " stays stable",
            lr=0.003,
            **_SMALL,
        ),
        Task(
            name="cifar-fine-96",
            about="the task `cifar-fine` at 96 pixels",
            lr=0.001,
            **{**_SMALL, "size": 96},
        ),
        Task(
            name="flowers-train-mode",
            about="the task `flowers` with batch norms in training mode",
            size=128,
            lr=0.01,
            fewer=(3, 4),
            **_LITE,
            **_FLOWERS,
        ),
        Task(
            name="flowers-smoothing",
            about="the task `flowers` with label smoothing 0.1",
            size=128,
            lr=0.003,
            frozen=True,
            smoothing=0.1,
            fewer=(4,),
            **_LITE,
            **_FLOWERS,
        ),
        Task(
            name="flowers-mixup",
            about="the task `flowers` with mixup 0.2",
            size=128,
            lr=0.003,
            frozen=True,
            mixup=0.2,
            fewer=(4,),
            **_LITE,
            **_FLOWERS,
        ),
        Task(
            name="scratch",
            about="a small ResNet from scratch on 12,000 images of CIFAR-10, batch norms in"
            " training mode",
            images=12000,
            **_SCRATCH,
            **_CIFAR,
        ),
        Task(
            name="scratch-vit",
            about="a small ViT from scratch on 12,000 images of CIFAR-10",
            images=12000,
            adam=True,
            model_kwargs={"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4},
            **{**_SCRATCH, "model": "vit_tiny_patch16_224", "lr": 2e-3, "weight_decay": 0.05},
            **_CIFAR,
        ),
    )
}
