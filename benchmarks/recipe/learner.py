"""Learner: one row of a table, in training; it measures its own processor time."""

import copy
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.dense_kernels import exact_passes
from benchmarks.recipe.images import Images
from benchmarks.recipe.rows import Row
from benchmarks.recipe.sampling import Order
from benchmarks.recipe.task import Task
from ssprop_fx import ssprop_compile

__all__ = ["Learner", "evaluate"]


class Learner:
    """A model in training by the way of one row; it is used for one seed after another.

    Args:
        task: the task.
        row: the row.
        weights: file with weights to start from.

    Attributes:
        seconds: processor time of its steps so far, without loading.
        shares: share of each batch that each backward kept.
    """

    def __init__(self, task: Task, row: Row, weights: Path | None) -> None:
        self.task, self.row = task, row
        self._weights = weights
        self._model = task.build(0, weights)
        if row.prepare is not None:
            self._model = row.prepare(self._model)
        self._compiled: Any = None

    def start(self, seed: int, images: Images) -> None:
        """Begin a run.

        Args:
            seed: decides the initial weights, the order of the images and their crops.
            images: the training images.
        """
        task, row = self.task, self.row
        self._model.load_state_dict(task.build(seed, self._weights).state_dict())
        epochs = row.epochs or task.epochs
        self._images = images
        self._order = Order(row, len(images), task.batch_size, epochs, seed)
        self.total = self._order.steps
        if self._compiled is None:
            self._scheduler = row.scheduler(self.total)
            self._compile(images)
        elif self._scheduler is not None:
            self._scheduler.load_state_dict({"last_step": 0})
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(self._model.parameters(), lr=task.lr, weight_decay=task.weight_decay)
            if task.adam
            else torch.optim.SGD(
                self._model.parameters(), lr=task.lr, momentum=0.9, weight_decay=task.weight_decay
            )
        )
        self._rates = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, self.total)
        self._generator = torch.Generator().manual_seed(seed)
        self._mix = random.Random(seed)
        self._draws = torch.Generator().manual_seed(seed).get_state()
        self.step_number, self.seconds = 0, 0.0
        self.shares: list[float] = []
        self._set_mode()

    def _compile(self, images: Images) -> None:
        """Compile the model and run each of its forms once, then undo what that has changed."""
        before = copy.deepcopy(self._model.state_dict())
        backend = self.task.backend
        self._compiled = (
            torch.compile(self._model, **_compile_settings(backend, self.row.exact))
            if self._scheduler is None
            else ssprop_compile(
                self._model, self._scheduler, config=self.row.config, backend=backend
            )
        )
        self._set_mode()
        generator = torch.Generator().manual_seed(0)
        size = max(int(self.task.batch_size * self.row.share), 1)
        sizes = (size, size - 1, size - 3) if self.row.stale or self.row.prunes else (size, size)
        for count in sizes:
            part = torch.arange(count)
            pixels = images.crops(part, self.task.size, generator)
            self._compiled(pixels).float().square().mean().backward()
            if self._scheduler is not None:
                with self._scheduler.dense():
                    self._compiled(pixels).float().square().mean().backward()
                self._scheduler.step()
        if self._scheduler is not None:
            self._scheduler.load_state_dict({"last_step": 0})
        self._model.zero_grad()
        self._model.load_state_dict(before)

    def _set_mode(self) -> None:
        self._model.train()
        for module in self._model.modules():
            if self.task.frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    @property
    def is_done(self) -> bool:
        """Whether the run has ended."""
        return self.step_number >= self.total

    @property
    def epoch(self) -> float:
        """Epochs done so far."""
        return self.step_number / self.total * (self.row.epochs or self.task.epochs)

    def step(self) -> None:
        """Train on the next batch."""
        task = self.task
        indices, factors = self._order.next()
        images = self._images.crops(indices, task.size, self._generator)
        labels = functional.one_hot(self._images.labels[indices], task.classes).float()
        if task.mixup:
            # As in timm: one share for the batch, mixed with the batch in reverse order.
            share = self._mix.betavariate(task.mixup, task.mixup)
            images = share * images + (1 - share) * images.flip(0)
            labels = share * labels + (1 - share) * labels.flip(0)
            images = images.contiguous(memory_format=torch.channels_last)
        # Rows draw different numbers; the draws of one do not move those of another.
        outer = torch.get_rng_state()
        torch.set_rng_state(self._draws)
        began = time.process_time()
        logits = self._compiled(images)
        losses = functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=task.smoothing
        )
        loss = (losses if factors is None else losses * factors).sum() / self._order.divisor
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.seconds += time.process_time() - began
        self._draws = torch.get_rng_state()
        torch.set_rng_state(outer)
        with torch.no_grad():
            norms = (logits.softmax(1) - labels).norm(dim=1)
        self._order.tell(indices, losses.detach(), norms)
        self.shares.append(self._share_kept(len(indices)))
        self._rates.step()
        self.step_number += 1
        if self._scheduler is not None:
            self._scheduler.step()

    def _share_kept(self, forward: int) -> float:
        """Return the share of a whole batch that the backward kept."""
        kept = 1.0
        if self._scheduler is not None and self.row.config.axis == "sample":
            told = self._compiled.ssprop.samples
            if self._scheduler.drop_rate > 0 and told is not None:
                kept = told.kept / told.size
        return kept * forward / self.task.batch_size

    def evaluate(self, test: Images) -> dict[str, float]:
        """Return accuracy, loss and calibration error on the test images."""
        self._model.eval()
        found = evaluate(self._model, test.batches(self.task.size, 100))
        self._set_mode()
        return found


def _compile_settings(backend: str, exact: bool) -> dict[str, Any]:
    """Return the settings of a dense `torch.compile`; `exact` adds passes that change nothing."""
    if not exact:
        return {"backend": backend}
    return {"options": {"joint_custom_pre_pass": exact_passes()}}


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return accuracy in percent, cross entropy and expected calibration error in percent.

    The calibration error has 15 bins of equal width (Guo et al., ICML 2017).
    """
    parts = [(model(images), labels) for images, labels in batches]
    logits = torch.cat([logits for logits, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == labels).float()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = [(right[bins == b] - confidence[bins == b]).sum().abs() for b in range(15)]
    return {
        "accuracy": 100 * right.mean().item(),
        "loss": functional.cross_entropy(logits, labels).item(),
        "ece": 100 * sum(float(gap) for gap in gaps) / len(labels),
    }
