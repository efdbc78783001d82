"""Trainer: training steps and epochs."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import Any

import torch
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ssprop_fx.analysis.report import Report, report
from ssprop_fx.runtime.module import SsPropModule
from ssprop_fx.scheduling.sample_rules import SampleTelemetry
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.loaders import Batch, Loaders, create_mixup
from ssprop_fx.training.distributed import Processes
from ssprop_fx.training.energy import EnergyMeter
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.interrupt import StopRequest
from ssprop_fx.training.precision import autocast, move_images, synchronize
from ssprop_fx.training.records.logs import Records
from ssprop_fx.training.records.rows import StepRow
from ssprop_fx.training.state import TrainState

__all__ = ["Trainer"]

# The first dense and the first sparse step compile; with CUDA graphs the second ones record.
_UNTIMED_STEPS = 2


class Trainer:
    """Trains one compiled model.

    Args:
        config: settings of the run.
        state: its state.
        compiled: `state.model`, compiled with `state.scheduler`.
        loaders: its batches.
        processes: its processes.
        records: records the steps; None in all processes except the first.
        meter: measures the energy.
        on_report: called once with the model's report, after the first sparse step.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        compiled: SsPropModule,
        loaders: Loaders,
        processes: Processes,
        records: Records | None,
        meter: EnergyMeter,
        on_report: Callable[[Report], None],
    ) -> None:
        self._config = config
        self._state = state
        self._compiled = compiled
        self._network: nn.Module = (
            compiled if processes.world_size == 1 else DistributedDataParallel(compiled)
        )
        self._loaders = loaders
        self._processes = processes
        self._records = records
        self._meter = meter
        self._on_report = on_report
        self._mixup = create_mixup(config, config.num_classes or compiled.num_classes)
        # Mixup has already smoothed the labels.
        self._criterion = nn.CrossEntropyLoss(
            label_smoothing=0.0 if self._mixup else config.smoothing
        )
        self._steps_seen: Counter[bool] = Counter()
        self._saved_fractions: dict[tuple[int, ...], float] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in a whole epoch."""
        return self._loaders.steps_per_epoch

    def train_epoch(
        self, stop: StopRequest, last_step: int, save_checkpoint: Callable[[], None]
    ) -> bool:
        """Train until the epoch ends, `last_step` is reached or a process is asked to stop.

        Args:
            stop: checked after each step.
            last_step: number of steps after which the run ends.
            save_checkpoint: called after every `config.checkpoint_every`-th step.

        Returns:
            Whether a process was asked to stop.

        Raises:
            CommandError: the loss is not finite.
        """
        state, every = self._state, self._config.checkpoint_every
        done = state.step - state.epoch * self.steps_per_epoch
        images_per_step = self._loaders.images_per_step
        self._loaders.sampler.set_epoch(state.epoch, skip=done * images_per_step)
        self._set_train_mode()
        end = min((state.epoch + 1) * self.steps_per_epoch, last_step)
        if state.step >= end:
            return False
        batches = iter(self._loaders.train)
        stopped = False
        with self._progress(last_step) as progress:
            self._meter.begin()
            began = time.perf_counter()
            while state.step < end and not stopped:
                loss, ms = self._train_step(batches)
                loss, asked = self._processes.mean(loss, float(stop.signal is not None))
                row = self._finish_step(loss, ms)
                stopped = asked > 0
                now = time.perf_counter()
                state.seconds += now - began
                progress.update()
                progress.set_postfix(
                    loss=f"{row.loss:.3f}",
                    drop_rate=f"{row.drop_rate:.2f}",
                    images_per_s=f"{images_per_step / (now - began):.0f}",
                    lr=f"{row.lr:.2g}",
                )
                began = now
                if every is not None and state.step % every == 0 and state.step < end:
                    self._add_energy()
                    save_checkpoint()
                    self._meter.begin()
                    began = time.perf_counter()
            self._add_energy()
        return stopped

    def _set_train_mode(self) -> None:
        self._network.train()
        if self._config.freeze_batch_norm:
            for module in self._state.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def _train_step(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """Run a step; return its loss in this process and the milliseconds that it took."""
        config = self._config
        seconds, losses = 0.0, []
        for part in range(config.grad_accum_steps):
            images, labels = self._prepare(*next(batches), part)
            is_last = part == config.grad_accum_steps - 1
            synchronize(self._processes.device)
            began = time.perf_counter()
            with self._without_reduction(is_last):
                with autocast(config, self._processes.device):
                    outputs = self._network(images)
                    loss = self._criterion(outputs.float(), labels)
                self._backward(loss / config.grad_accum_steps, update=is_last)
            synchronize(self._processes.device)
            seconds += time.perf_counter() - began
            losses.append(loss.detach())
        return torch.stack(losses).mean().item(), 1000 * seconds

    def _prepare(self, images: torch.Tensor, labels: torch.Tensor, part: int) -> Batch:
        device = self._processes.device
        images, labels = images.to(device, non_blocking=True), labels.to(device)
        if self._mixup is not None:
            state = self._state
            images, labels = self._mixup(
                images, labels, state.epoch, state.step, part, self._processes.rank
            )
        return move_images(images, self._config, device), labels

    def _backward(self, loss: torch.Tensor, *, update: bool) -> None:
        state, config = self._state, self._config
        if state.scaler is not None:
            state.scaler(
                loss,
                state.optimizer,
                clip_grad=config.clip_grad,
                clip_mode=config.clip_mode,
                parameters=state.model.parameters(),
                need_update=update,
            )
        else:
            torch.autograd.backward(loss)
            if update:
                if config.clip_grad is not None:
                    dispatch_clip_grad(
                        state.model.parameters(), config.clip_grad, mode=config.clip_mode
                    )
                state.optimizer.step()
        if update:
            state.optimizer.zero_grad()

    def _finish_step(self, loss: float, ms: float) -> StepRow:
        """Record the finished step and advance to the next."""
        state = self._state
        if not math.isfinite(loss):
            raise CommandError(
                f"the loss is {loss} at step {state.step}; a lower --lr or --clip-grad may help",
                exit_code=1,
            )
        is_sparse = state.scheduler.drop_rate > 0
        samples = self._samples_maybe() if is_sparse else None
        self._steps_seen[is_sparse] += 1
        row = StepRow(
            step=state.step,
            epoch=state.epoch,
            loss=loss,
            drop_rate=state.scheduler.drop_rate if samples is None else samples.drop_rate,
            backward_saved=self._backward_saved(samples),
            lr=state.optimizer.param_groups[0]["lr"],
            ms=ms,
            timed=int(self._steps_seen[is_sparse] > _UNTIMED_STEPS),
            kept_mass=self._kept_mass(samples),
            added_noise=math.nan if samples is None else samples.error,
        )
        if self._records is not None:
            self._records.add_step(row)
        state.step += 1
        state.scheduler.step()
        if state.lr_scheduler is not None:
            state.lr_scheduler.step_update(state.step)
        if state.ema is not None:
            state.ema.update(state.model, step=state.step)
        return row

    def _samples_maybe(self) -> SampleTelemetry | None:
        """Return what the finished backward kept of its batch; None if that says nothing."""
        variants = self._compiled.ssprop
        return None if variants.kept_samples is None else variants.samples

    def _backward_saved(self, samples: SampleTelemetry | None) -> float:
        """Return the fraction of the dense backward's FLOPs that the finished step left out."""
        scheduler = self._state.scheduler
        if scheduler.drop_rate == 0:
            return 0.0
        keep_counts = tuple(scheduler.keep_counts.tolist())
        key = keep_counts if samples is None else (*keep_counts, samples.kept, samples.size)
        if key not in self._saved_fractions:
            found = report(self._compiled)
            if not self._saved_fractions:
                self._on_report(found)
            whole = found.backward_flops
            self._saved_fractions[key] = found.saved_flops / whole if whole else math.nan
        return self._saved_fractions[key]

    def _kept_mass(self, samples: SampleTelemetry | None) -> float:
        """Return the kept mass of the finished step, of layers their mean; NaN if unknown."""
        if samples is not None:
            return samples.kept_mass
        if not (self._config.sparsity.telemetry or self._config.has_controller):
            return math.nan
        if self._state.scheduler.drop_rate == 0:
            return 1.0
        told = self._state.scheduler.telemetry().values()
        return fmean(site.kept_mass for site in told) if told else math.nan

    def _add_energy(self) -> None:
        used = self._meter.end()
        self._state.gpu_joules += used.gpu
        self._state.cpu_joules += used.cpu

    def _without_reduction(self, is_last: bool) -> AbstractContextManager[Any]:
        """Reduce gradients over the processes only with the last accumulated batch."""
        if is_last or not isinstance(self._network, DistributedDataParallel):
            return nullcontext()
        return self._network.no_sync()

    def _progress(self, last_step: int) -> Any:
        # The bar shows only on a terminal; elsewhere each epoch prints a line.
        return tqdm(
            total=last_step,
            initial=self._state.step,
            desc=f"epoch {self._state.epoch}",
            unit="step",
            leave=False,
            disable=None if self._processes.is_first else True,
        )
