"""A whole training run: set up, train, save, report."""

import math
import shlex
import sys
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from timm.utils import random_seed

from ssprop_fx.analysis.report import Report
from ssprop_fx.compile import ssprop_compile
from ssprop_fx.training.allocator import keep_freed_memory
from ssprop_fx.training.checkpoint import BEST, LAST, restore, save_checkpoint
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.config_file import CONFIG, write_config
from ssprop_fx.training.data.contents import check_same_data, describe_classes, describe_data
from ssprop_fx.training.data.datasets import create_datasets
from ssprop_fx.training.data.loaders import create_loaders
from ssprop_fx.training.distributed import Processes, join_processes
from ssprop_fx.training.energy import EnergyMeter
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.evaluation import evaluate
from ssprop_fx.training.files import remove_leftovers
from ssprop_fx.training.interrupt import StopRequest
from ssprop_fx.training.loop import Trainer
from ssprop_fx.training.precision import memory_format
from ssprop_fx.training.records.logs import Records
from ssprop_fx.training.records.plot import plot_run
from ssprop_fx.training.records.rows import EpochRow
from ssprop_fx.training.records.summary import format_summary
from ssprop_fx.training.records.tensorboard import check_tensorboard
from ssprop_fx.training.setup import (
    check_names,
    check_rates,
    create_data_config,
    create_model,
    create_state,
    find_device,
    sparsity_config,
)
from ssprop_fx.training.weights import without_weights

__all__ = ["train"]


def train(
    config: TrainConfig,
    *,
    folder: Path | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    changed_data: bool = False,
) -> int:
    """Train a model and save weights, records and a plot of the run in a folder.

    Args:
        config: settings of the run.
        folder: folder of the run; None makes one in `config.output`.
        checkpoint: result of `load_checkpoint`, to resume that run; None starts a new run.
        changed_data: whether a resumed run may find other images of the same classes.

    Returns:
        Exit status: 0, or 128 + signal number if a signal ended the run.

    Raises:
        CommandError: a setting does not fit the data, the model or the machine, or the folder
            cannot be written to.
    """
    check_names(config)
    if config.tensorboard:
        check_tensorboard()
    with join_processes(find_device(config.device)) as processes:
        run = _Run(config, processes, checkpoint, folder, changed_data)
        try:
            return run.run()
        except OSError as error:
            where = error.filename or run.folder
            raise CommandError(
                f"{where}: {error.strerror or error}; earlier checkpoints are unchanged;"
                f" {run.how_to_resume()}",
                exit_code=1,
            ) from error


class _Run:
    """One process's part of a run; only the first process prints and writes."""

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes,
        checkpoint: Mapping[str, Any] | None,
        folder: Path | None,
        changed_data: bool,
    ) -> None:
        device = processes.device
        if device.type == "cpu":
            keep_freed_memory()
        # All processes start with the same weights, then each uses its own random numbers.
        random_seed(config.seed)
        datasets = create_datasets(config)
        data_config = create_data_config(config, datasets)
        steps_per_epoch = None
        if checkpoint is not None:
            steps_per_epoch = check_same_data(checkpoint["data"], datasets, changed=changed_data)
        self._loaders = create_loaders(config, datasets, data_config, processes, steps_per_epoch)
        start = config if checkpoint is None else without_weights(config)
        model = create_model(start, datasets.num_classes, data_config["input_size"][-1])
        model = model.to(device).to(memory_format=memory_format(config))
        random_seed(config.seed, processes.rank)
        self._config = config
        self._processes = processes
        self._state = create_state(config, model, self._loaders.steps_per_epoch)
        sparsity = sparsity_config(config)
        check_rates(sparsity, model)
        self._compiled = ssprop_compile(
            model,
            self._state.scheduler,
            config=sparsity,
            backend=config.compile_backend,
            mode=config.compile_mode,
        )
        self._state.memory = self._compiled.ssprop.memory
        self._is_new = checkpoint is None
        if checkpoint is not None:
            restore(self._state, checkpoint, processes)
        self._datasets = datasets
        self._data = describe_data(datasets, self._loaders.steps_per_epoch)
        self._meter = EnergyMeter(processes, enabled=config.energy)
        self._records: Records | None = None
        self.folder = folder or _name_folder(config, processes)

    def run(self) -> int:
        """Train from the current state to the end."""
        config, state, loaders = self._config, self._state, self._loaders
        if self._processes.is_first:
            self._records = self._open_folder()
        self._print(
            f"{config.model} on {self._processes.device}: {len(self._datasets.train)} training"
            f" images, {loaders.steps_per_epoch} steps an epoch, {state.scheduler.schedule}\n"
            f"run folder: {self.folder}"
        )
        for line in describe_classes(self._datasets):
            self._print(line)
        for path, left_out in self._datasets.left_out.items():
            if left_out:
                self._print(f"left out of {path}: {left_out}")
        # So that a run can resume from its first step on, and a full disk fails at once.
        if self._is_new:
            self._save(LAST)
        trainer = Trainer(
            config,
            state,
            self._compiled,
            loaders,
            self._processes,
            self._records,
            self._meter,
            self._keep_report,
        )
        with StopRequest() as stop:
            try:
                self._train_epochs(trainer, stop)
            except Exception as error:
                if stop.signal is None:
                    raise
                # Ctrl-C also kills a running C++ compiler, and the step fails with it. The step
                # is half done, so the last checkpoint stays.
                raise CommandError(
                    f"interrupted in step {state.step}, which was compiling;"
                    f" {self.how_to_resume()}",
                    stop.exit_code,
                ) from error
            finally:
                if self._records is not None:
                    self._records.flush()
        if self._records is not None:
            self._close(self._records)
        if stop.signal is not None and self._processes.is_first:
            print(f"stopped after {state.step} steps; {self.how_to_resume()}", file=sys.stderr)
        return stop.exit_code

    def how_to_resume(self) -> str:
        """Return the command that resumes the run."""
        path = self.folder / LAST
        if path.exists():
            return f"continue with: ssprop-fx train --resume {shlex.quote(str(path))}"
        return "there is no checkpoint yet"

    def _train_epochs(self, trainer: Trainer, stop: StopRequest) -> None:
        config, state = self._config, self._state
        last_step = config.epochs * self._loaders.steps_per_epoch
        if config.max_steps is not None:
            last_step = min(last_step, config.max_steps)
        while state.epoch < config.epochs:
            result = None
            if not trainer.train_epoch(stop, last_step, lambda: self._save(LAST)):
                result = evaluate(config, state, self._loaders.validation, self._processes, stop)
            if result is None:
                self._save(LAST)
                return
            is_best = self._finish_epoch(*result, last_step)
            # The best one first: once the last one is updated, both are.
            if is_best:
                self._save(BEST)
            self._save(LAST)
            if state.step >= last_step or self._processes.any(stop.signal is not None):
                return

    def _finish_epoch(self, eval_loss: float, eval_top1: float, last_step: int) -> bool:
        """Record an epoch's results; return whether it is the best so far."""
        state = self._state
        if self._records is not None:
            row = self._records.add_epoch(
                epoch=state.epoch,
                eval_loss=eval_loss,
                eval_top1=eval_top1,
                batch_size=self._loaders.images_per_step,
                seconds=state.seconds,
                # Counters update rarely; 0 means the epoch was too short to measure.
                gpu_joules=state.gpu_joules or math.nan,
                cpu_joules=state.cpu_joules or math.nan,
            )
            steps = sum(step.epoch == row.epoch for step in self._records.steps)
            self._print(_describe(row, (last_step - state.step) * row.seconds / steps))
        is_best = eval_top1 > state.best_top1
        if is_best:
            state.best_top1, state.best_epoch = eval_top1, state.epoch
        if state.step >= (state.epoch + 1) * self._loaders.steps_per_epoch:
            state.epoch += 1
            state.seconds = state.gpu_joules = state.cpu_joules = 0.0
        return is_best

    def _open_folder(self) -> Records:
        config, folder, state = self._config, self.folder, self._state
        if self._is_new and (folder / LAST).exists():
            raise CommandError(
                f"--experiment {folder.name}: {folder} already holds a run; continue it with"
                f" --resume {shlex.quote(str(folder / LAST))} or choose another name"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"--output {config.output}: {error.strerror}: {folder}") from error
        remove_leftovers(folder)
        write_config(folder / CONFIG, config)
        return Records(folder, step=state.step, epoch=state.epoch, tensorboard=config.tensorboard)

    def _save(self, name: str) -> None:
        # Rows first: a run that resumes from the checkpoint needs all rows before it.
        if self._records is not None:
            self._records.flush()
        save_checkpoint(self.folder / name, self._state, self._config, self._processes, self._data)

    def _close(self, records: Records) -> None:
        config = self._config
        records.close()
        if config.plot and records.steps:
            plot_run(records, self.folder / "plot.png", f"{config.model}, {config.schedule}")
        print(format_summary(records, self._loaders.images_per_step, self._meter.reason))

    def _keep_report(self, found: Report) -> None:
        if self._processes.is_first:
            (self.folder / "sites.txt").write_text(f"{found}\n", encoding="utf-8")

    def _print(self, text: str) -> None:
        if self._processes.is_first:
            print(text, flush=True)


def _name_folder(config: TrainConfig, processes: Processes) -> Path:
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.replace('/', '_')}"
    return Path(config.output) / (config.experiment or processes.gather(name)[0])


def _describe(row: EpochRow, seconds_left: float) -> str:
    text = (
        f"epoch {row.epoch:>3}  loss {row.train_loss:.4f}  eval loss {row.eval_loss:.4f}"
        f"  top-1 {row.eval_top1:6.2f} %  drop rate {row.drop_rate:.2f}"
        f"  {row.images_per_s:.0f} images/s"
    )
    return f"{text}  {timedelta(seconds=round(seconds_left))} left" if seconds_left else text
