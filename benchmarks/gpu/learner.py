"""One network that is trained again and again: compiled once, with new weights for each run."""

import copy
import time
from collections.abc import Iterable
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.cifar import Images
from benchmarks.timing import synchronize
from ssprop_fx import SparsityConfig, SparsityScheduler, ssprop_compile

__all__ = ["Learner", "Recipe", "Trained", "build"]

_WARMUP = 0.2
_FIRST_STEPS = 3


@dataclass(frozen=True)
class Recipe:
    """How every row trains; SGD with momentum 0.9, whose rate rises and then falls to 0.

    Attributes:
        batch_size: images in a batch.
        lr: highest learning rate.
        weight_decay: of all parameters.
        backend: compiler, `"inductor"` or `"aot_eager"`.
    """

    batch_size: int = 512
    lr: float = 0.4
    weight_decay: float = 5e-4
    backend: str = "inductor"


@dataclass(frozen=True)
class Trained:
    """What came of one run.

    Attributes:
        accuracy: share of the test images that are classified correctly, in percent.
        seconds: time of the training, without compile and test.
        kept: mean share of the samples that the backwards kept.
    """

    accuracy: float
    seconds: float
    kept: float


def build(is_tiny: bool) -> nn.Module:
    """Return a ResNet-18 for images of 32 x 32; in a rehearsal, a smaller one."""
    if is_tiny:
        tiny: nn.Module = timm.create_model("test_resnet", num_classes=10)
        return tiny
    model = timm.create_model("resnet18", num_classes=10)
    # The stem for 224 x 224 would leave 8 x 8 pixels to the first block.
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


class Learner:
    """A compiled network and its scheduler, for all runs of one row.

    Args:
        images: the data, on the device.
        recipe: how it trains.
        is_tiny: whether this is a rehearsal.
        scheduler: chooses samples; None for dense training.
    """

    def __init__(
        self, images: Images, recipe: Recipe, is_tiny: bool, scheduler: SparsityScheduler | None
    ) -> None:
        self.images = images
        self.recipe = recipe
        self.is_tiny = is_tiny
        self.scheduler = scheduler
        self.device = images.train.device
        self.model = build(is_tiny).to(self.device, memory_format=torch.channels_last)
        if scheduler is None:
            self.compiled = torch.compile(self.model, backend=recipe.backend)
        else:
            config = SparsityConfig(axis="sample")
            self.compiled = ssprop_compile(
                self.model, scheduler, config=config, backend=recipe.backend
            )
        self._fresh = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._is_compiled = False

    def train(self, epochs: int, seed: int) -> Trained:
        """Train from new weights, and test.

        Args:
            epochs: epochs of the whole training.
            seed: seed of the weights, the order of the images, and augmentation.
        """
        if not self._is_compiled:
            self._begin(seed)
            self._run(self._batches(1), _FIRST_STEPS)
            self._is_compiled = True
        self._begin(seed)
        steps = epochs * (len(self.images.train) // self.recipe.batch_size)
        synchronize()
        start = time.perf_counter()
        kept = self._run(self._batches(epochs), steps)
        synchronize()
        seconds = time.perf_counter() - start
        return Trained(self._accuracy(), seconds, kept)

    def _begin(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model.load_state_dict(build(self.is_tiny).state_dict())
        if self.scheduler is not None and self._fresh is not None:
            self.scheduler.load_state_dict(copy.deepcopy(self._fresh))
        self.model.train()

    def _batches(self, epochs: int) -> Iterable[tuple[Tensor, Tensor]]:
        for _ in range(epochs):
            yield from self.images.epoch(self.recipe.batch_size)

    def _run(self, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> float:
        """Train for all steps of a training; return the mean share of the samples kept."""
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=self.recipe.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.recipe.weight_decay,
        )
        kept = 0.0
        for step, (images, labels) in zip(range(steps), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr * _slope((step + 1) / (steps + 1))
            with torch.autocast(self.device.type, torch.bfloat16):
                output = self.compiled(images)
            functional.cross_entropy(output.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            kept += self._share_kept()
            if self.scheduler is not None:
                self.scheduler.step()
        return kept / steps

    def _share_kept(self) -> float:
        """Return the share of the samples that the last backward kept."""
        if self.scheduler is None:
            return 1.0
        kept = self.compiled.ssprop.kept_samples
        # None: a backward of the whole batch.
        return 1.0 if kept is None else kept[0] / kept[1]

    def _accuracy(self) -> float:
        self.model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            for images, labels in self.images.tests(1000):
                correct += (self.model(images).argmax(1) == labels).sum()
        return 100 * int(correct) / len(self.images.test)


def _slope(part: float) -> float:
    """Return the learning rate over its highest value, after a part of the training.

    Example:
        >>> [_slope(part) for part in (0.1, 0.2, 0.6)]
        [0.5, 1.0, 0.5]
    """
    return min(part / _WARMUP, (1 - part) / (1 - _WARMUP))
