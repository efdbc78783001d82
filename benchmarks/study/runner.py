"""One run of the study: `ssprop-fx train` with a setting's flags, then all test images once."""

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.study.model  # noqa: F401 the import makes the model known to timm
from benchmarks.machine import environment
from benchmarks.study.data import unpack
from benchmarks.study.store import Result, append_result
from benchmarks.study.task import Setting
from ssprop_fx.training.checkpoint import LAST
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.datasets import create_datasets
from ssprop_fx.training.data.loaders import Batch, create_loaders
from ssprop_fx.training.distributed import Processes
from ssprop_fx.training.files import replace_file
from ssprop_fx.training.records.rows import EPOCHS, EpochRow, read_rows
from ssprop_fx.training.run import train
from ssprop_fx.training.setup import create_data_config, find_device

__all__ = ["Places", "run_one"]


@dataclass(frozen=True)
class Places:
    """Files and folders of a study.

    Attributes:
        results: JSONL file of the results.
        work: folder of unpacked images and of weights that other runs start from.
        archive: zip of CIFAR-10; with None, only digits can run.
    """

    results: Path
    work: Path
    archive: Path | None


def run_one(setting: Setting, seed: int, places: Places) -> Result:
    """Train, test, and append the result to the file of results.

    Args:
        setting: the setting to run.
        seed: seed of initial weights, order of the images and augmentation.
        places: files and folders.

    Returns:
        The result, as written to its line.

    Raises:
        CommandError: a flag does not fit.
        ValueError: the run needs an archive or weights that do not exist.
        KeyboardInterrupt: a signal ended the training.
    """
    torch._dynamo.reset()
    config = create_config(setting, seed, places)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if train(config, folder=folder):
            raise KeyboardInterrupt
        epochs = read_rows(folder / EPOCHS, EpochRow)
        weights = torch.load(folder / LAST, weights_only=True)["state_dict"]
    batches, num_classes = _test_images(config)
    model = _create_model(config, num_classes)
    model.load_state_dict(weights)
    result = {
        "task": setting.task.name,
        "setting": setting.name,
        "seed": seed,
        "accuracy": accuracy(model, batches, find_device(config.device)),
        "epochs": config.epochs,
        "backward_saved": fmean(row.backward_saved for row in epochs),
        "forward_flops": forward_flops(model, batches[0][0][:1]),
        "train_loss": epochs[-1].train_loss,
        "seconds": round(sum(row.seconds for row in epochs), 1),
        **environment(find_device(config.device).type),
    }
    if setting.is_start:
        replace_file(_weights(places, setting.name), lambda file: torch.save(weights, file))
    append_result(places.results, result)
    return result


def create_config(setting: Setting, seed: int, places: Places) -> TrainConfig:
    """Return the settings of one run.

    Raises:
        CommandError: a flag does not fit.
        ValueError: the run needs an archive or weights that do not exist.
    """
    task = setting.task
    flags: dict[str, Any] = {**setting.flags, "seed": seed, "plot": False, "energy": False}
    if task.classes:
        if places.archive is None:
            raise ValueError(f"{setting.key} needs --data, a zip of CIFAR-10")
        images = unpack(places.archive, places.work, task.classes, task.per_class)
        flags["data_dir"] = str(images)
    if setting.start is not None:
        path = _weights(places, setting.start)
        if not path.exists():
            raise ValueError(f"{setting.key} starts from {setting.start}: run that first")
        # timm's way to start from a file; num_classes=0 leaves out the file's classifier.
        overlay = {"file": str(path), "num_classes": 0}
        kwargs = flags.get("model_kwargs") or {}
        flags["model_kwargs"] = {**kwargs, "pretrained_cfg_overlay": overlay}
        flags["pretrained"] = True
    return TrainConfig.from_settings(flags)


def accuracy(model: torch.nn.Module, batches: list[Batch], device: torch.device) -> float:
    """Return the share of images that a model classifies correctly, in percent."""
    model = model.to(device).eval()
    correct = count = 0
    with torch.no_grad():
        for images, labels in batches:
            outputs = model(images.to(device, memory_format=torch.channels_last))
            correct += int((outputs.argmax(1).cpu() == labels.cpu()).sum())
            count += len(labels)
    return 100 * correct / count


def forward_flops(model: torch.nn.Module, image: torch.Tensor) -> int:
    """Return the floating-point operations of a model's forward pass on one image [1, 3, H, W]."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.cpu().eval()(image.cpu())
    return int(counter.get_total_flops())


def _create_model(config: TrainConfig, num_classes: int) -> torch.nn.Module:
    kwargs = {**(config.model_kwargs or {})}
    kwargs.pop("pretrained_cfg_overlay", None)
    model: torch.nn.Module = timm.create_model(config.model, num_classes=num_classes, **kwargs)
    return model


def _test_images(config: TrainConfig) -> tuple[list[Batch], int]:
    names = ("model", "data_dir", "img_size", "validation_batch_size")
    return _read_test_images(tuple((name, getattr(config, name)) for name in names))


@functools.lru_cache(maxsize=2)
def _read_test_images(settings: tuple[tuple[str, Any], ...]) -> tuple[list[Batch], int]:
    # Read once for all runs: reading takes as long as an epoch of the small grid.
    config = TrainConfig(**dict(settings), val_split="test")
    datasets = create_datasets(config)
    data_config = create_data_config(config, datasets)
    loaders = create_loaders(config, datasets, data_config, Processes())
    return list(loaders.validation), datasets.num_classes


def _weights(places: Places, name: str) -> Path:
    places.work.mkdir(parents=True, exist_ok=True)
    return places.work / f"{name}.pt"
