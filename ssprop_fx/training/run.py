"""A whole training run: set up, train, keep, report."""

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed

from ssprop_fx.compile import ssprop_compile
from ssprop_fx.report import Report
from ssprop_fx.training.allocator import keep_freed_memory
from ssprop_fx.training.checkpoint import BEST, LAST, restore, save_checkpoint
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data import create_datasets, create_loaders
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.interrupt import StopRequest
from ssprop_fx.training.loop import Trainer
from ssprop_fx.training.plot import plot_run
from ssprop_fx.training.records import EpochRow, Records
from ssprop_fx.training.setup import (
    check_names,
    create_data_config,
    create_model,
    create_state,
    find_device,
    sparsity_config,
)
from ssprop_fx.training.state import TrainState
from ssprop_fx.training.summary import format_summary

__all__ = ["train"]


def train(
    config: TrainConfig, *, folder: Path | None = None, checkpoint: Mapping[str, Any] | None = None
) -> int:
    """Train a model and keep weights, records and a picture of the run in a folder.

    Args:
        config: settings of the run.
        folder: folder of the run; None makes one in `config.output`.
        checkpoint: what `load_checkpoint` returned, to continue that run.

    Returns:
        Exit status: 0, or 128 + signal number if a signal ended the run.

    Raises:
        CommandError: a setting does not fit the data, the model or the machine.
    """
    check_names(config)
    device = find_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    random_seed(config.seed)
    datasets = create_datasets(config)
    data_config = create_data_config(config, datasets)
    loaders = create_loaders(config, datasets, data_config, device)
    model = create_model(config, datasets.num_classes, data_config["input_size"][-1])
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=layout)
    state = create_state(config, model, loaders.steps_per_epoch)
    compiled = ssprop_compile(
        model,
        state.scheduler,
        config=sparsity_config(config),
        backend=config.compile_backend,
        mode=config.compile_mode,
    )
    folder = folder or _create_folder(config)
    if checkpoint is not None:
        restore(state, checkpoint)
    records = Records(folder, step=state.step, epoch=state.epoch)

    def keep_report(found: Report) -> None:
        (folder / "sites.txt").write_text(f"{found}\n")

    trainer = Trainer(config, state, compiled, loaders, records, device, keep_report)
    print(
        f"{config.model} on {device}: {len(datasets.train)} training images,"
        f" {loaders.steps_per_epoch} steps an epoch, {state.scheduler.schedule}\n"
        f"run folder: {folder}",
        flush=True,
    )
    last_step = config.epochs * loaders.steps_per_epoch
    if config.max_steps is not None:
        last_step = min(last_step, config.max_steps)
    with StopRequest() as stop:
        try:
            _train_epochs(config, state, trainer, records, folder, stop, last_step)
        except Exception as error:
            if stop.signal is None:
                raise
            # Ctrl-C reaches a C++ compiler at work as well, and the step fails with it. Such a
            # step is half done: the last checkpoint stays as it is.
            raise CommandError(
                f"interrupted in step {state.step}, which was compiling; {_how_to_resume(folder)}",
                stop.exit_code,
            ) from error
        finally:
            records.flush()
    if config.plot and records.steps:
        plot_run(records, folder / "plot.png", f"{config.model}, {config.schedule}")
    print(format_summary(records, config.batch_size))
    if stop.signal is not None:
        print(f"stopped after {state.step} steps; {_how_to_resume(folder)}", file=sys.stderr)
    return stop.exit_code


def _train_epochs(
    config: TrainConfig,
    state: TrainState,
    trainer: Trainer,
    records: Records,
    folder: Path,
    stop: StopRequest,
    last_step: int,
) -> None:
    while state.epoch < config.epochs:
        trainer.train_epoch(stop, last_step)
        result = None if stop.signal is not None else trainer.evaluate(stop)
        if result is None:
            records.flush()
            save_checkpoint(folder / LAST, state, config)
            return
        eval_loss, eval_top1 = result
        row = records.add_epoch(
            epoch=state.epoch,
            eval_loss=eval_loss,
            eval_top1=eval_top1,
            batch_size=config.batch_size,
            seconds=state.seconds,
        )
        _print_epoch(row)
        is_best = eval_top1 > state.best_top1
        if is_best:
            state.best_top1, state.best_epoch = eval_top1, state.epoch
        if state.step == (state.epoch + 1) * trainer.steps_per_epoch:
            state.epoch, state.seconds = state.epoch + 1, 0.0
        save_checkpoint(folder / LAST, state, config)
        if is_best:
            save_checkpoint(folder / BEST, state, config)
        if stop.signal is not None or state.step >= last_step:
            return


def _create_folder(config: TrainConfig) -> Path:
    name = config.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.replace('/', '_')}"
    folder = Path(config.output) / name
    if (folder / LAST).exists():
        raise CommandError(
            f"--experiment {name}: {folder} already holds a run; continue it with --resume"
            f" {folder / LAST} or choose another name"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {config.output}: {error.strerror}: {folder}") from error
    return folder


def _how_to_resume(folder: Path) -> str:
    path = folder / LAST
    if path.exists():
        return f"continue with: ssprop-fx train --resume {path}"
    return "there is no checkpoint yet"


def _print_epoch(row: EpochRow) -> None:
    print(
        f"epoch {row.epoch:>3}  loss {row.train_loss:.4f}  eval loss {row.eval_loss:.4f}"
        f"  top-1 {row.eval_top1:6.2f} %  drop rate {row.drop_rate:.2f}"
        f"  {row.images_per_s:.0f} images/s",
        flush=True,
    )
