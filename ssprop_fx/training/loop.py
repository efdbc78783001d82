"""One training step, one epoch, one evaluation."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.utils import dispatch_clip_grad
from torch import nn
from tqdm import tqdm

from ssprop_fx.module import SsPropModule
from ssprop_fx.report import Report, report
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data import Loaders
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.interrupt import StopRequest
from ssprop_fx.training.records import Records, StepRow
from ssprop_fx.training.state import TrainState

__all__ = ["Trainer"]

# The first step of a phase kind compiles its graphs; with CUDA graphs the second one records.
_UNTIMED_STEPS = 2


class Trainer:
    """Trains one compiled model.

    Args:
        config: settings of the run.
        state: its state.
        compiled: `state.model` as compiled with `state.scheduler`.
        loaders: its batches.
        records: where its steps are noted.
        device: where it runs.
        on_report: called once with the model's report, after the first sparse step.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        compiled: SsPropModule,
        loaders: Loaders,
        records: Records,
        device: torch.device,
        on_report: Callable[[Report], None],
    ) -> None:
        self._config = config
        self._state = state
        self._compiled = compiled
        self._loaders = loaders
        self._records = records
        self._device = device
        self._on_report = on_report
        self._criterion = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
        self._steps_seen: Counter[bool] = Counter()
        self._saved_fractions: dict[tuple[int, ...], float] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in a whole epoch."""
        return self._loaders.steps_per_epoch

    def train_epoch(self, stop: StopRequest, last_step: int) -> None:
        """Train to the end of the epoch in progress, to `last_step`, or until `stop` is asked for.

        Args:
            stop: looked at after each step.
            last_step: number of steps after which the run ends.

        Raises:
            CommandError: the loss is not finite.
        """
        config, state = self._config, self._state
        done = state.step - state.epoch * self.steps_per_epoch
        self._loaders.sampler.set_epoch(state.epoch, skip=done * config.batch_size)
        self._compiled.train()
        # The bar shows on a terminal alone; elsewhere each epoch prints a line.
        progress = tqdm(
            total=self.steps_per_epoch,
            initial=done,
            desc=f"epoch {state.epoch}",
            unit="step",
            leave=False,
            disable=None,
        )
        with progress:
            if state.step >= last_step or done == self.steps_per_epoch:
                return
            began = time.perf_counter()
            for images, labels in self._loaders.train:
                row = self._train_step(self._move(images), labels.to(self._device))
                now = time.perf_counter()
                state.seconds += now - began
                progress.update()
                progress.set_postfix(
                    loss=f"{row.loss:.3f}",
                    drop_rate=f"{row.drop_rate:.2f}",
                    images_per_s=f"{config.batch_size / (now - began):.0f}",
                    lr=f"{row.lr:.2g}",
                )
                began = now
                if stop.signal is not None or state.step >= last_step:
                    return

    def evaluate(self, stop: StopRequest) -> tuple[float, float] | None:
        """Evaluate on the validation images.

        Returns:
            The loss, without smoothing, and the share of correct answers in percent; None if
            `stop` was asked for meanwhile.
        """
        # The model itself, not its compiled form: nothing is saved in a forward pass, and modes
        # and batch sizes of their own would cost compilations.
        model = self._state.model.eval()
        loss, correct, count = 0.0, 0, 0
        batches: Iterable[Any] = tqdm(
            self._loaders.validation, desc="validation", leave=False, disable=None
        )
        with torch.no_grad():
            for images, labels in batches:
                labels = labels.to(self._device)
                with self._autocast():
                    outputs = model(self._move(images))
                outputs = outputs.float()
                loss += nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
                correct += int((outputs.argmax(dim=1) == labels).sum())
                count += len(labels)
                if stop.signal is not None:
                    return None
        return loss / count, 100 * correct / count

    def _train_step(self, images: torch.Tensor, labels: torch.Tensor) -> StepRow:
        state = self._state
        drop_rate = state.scheduler.drop_rate
        lr = state.optimizer.param_groups[0]["lr"]
        self._synchronize()
        began = time.perf_counter()
        with self._autocast():
            outputs = self._compiled(images)
            loss = self._criterion(outputs.float(), labels)
        self._update(loss)
        self._synchronize()
        ms = 1000 * (time.perf_counter() - began)

        loss_value = loss.item()
        if not math.isfinite(loss_value):
            raise CommandError(
                f"the loss is {loss_value} at step {state.step}; a lower --lr or --clip-grad may"
                " help",
                exit_code=1,
            )
        self._steps_seen[drop_rate > 0] += 1
        row = StepRow(
            step=state.step,
            epoch=state.epoch,
            loss=loss_value,
            drop_rate=drop_rate,
            backward_saved=self._backward_saved(),
            lr=lr,
            ms=ms,
            timed=int(self._steps_seen[drop_rate > 0] > _UNTIMED_STEPS),
        )
        self._records.add_step(row)
        state.step += 1
        state.scheduler.step()
        if state.lr_scheduler is not None:
            state.lr_scheduler.step_update(state.step)
        return row

    def _update(self, loss: torch.Tensor) -> None:
        state, clip = self._state, self._config.clip_grad
        if state.scaler is not None:
            state.scaler(loss, state.optimizer, clip_grad=clip, parameters=state.model.parameters())
        else:
            torch.autograd.backward(loss)
            if clip is not None:
                dispatch_clip_grad(state.model.parameters(), clip)
            state.optimizer.step()
        state.optimizer.zero_grad()

    def _backward_saved(self) -> float:
        """Return the fraction of the dense backward's FLOPs that the step just done left out."""
        scheduler = self._state.scheduler
        if scheduler.drop_rate == 0:
            return 0.0
        keep_counts = tuple(scheduler.keep_counts.tolist())
        if keep_counts not in self._saved_fractions:
            found = report(self._compiled)
            if not self._saved_fractions:
                self._on_report(found)
            whole = found.backward_flops
            self._saved_fractions[keep_counts] = found.saved_flops / whole if whole else math.nan
        return self._saved_fractions[keep_counts]

    def _move(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self._config.channels_last else torch.contiguous_format
        return images.to(self._device, non_blocking=True).contiguous(memory_format=layout)

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self._config.amp:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self._config.amp_dtype))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
