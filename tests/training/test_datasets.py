"""The datasets that `ssprop-fx train` reads."""

import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import TINY, content

from ssprop_fx.cli.app import main
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data.datasets import create_datasets
from ssprop_fx.training.data.digits import Digits
from ssprop_fx.training.data.loaders import create_loaders, create_mixup
from ssprop_fx.training.distributed import Processes
from ssprop_fx.training.errors import CommandError

CLASSES = ("cat", "dog", "owl")
DATA_CONFIG = {
    "input_size": (3, 16, 16),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def _save_images(folder, classes, number):
    generator = np.random.default_rng(0)
    for label in classes:
        (folder / label).mkdir(parents=True)
        for index in range(number):
            pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")


def _pack(folder):
    """Pack a folder into a tar next to it, and remove the folder."""
    with tarfile.open(f"{folder}.tar", "w") as tar:
        for path in sorted(folder.rglob("*.png")):
            tar.add(path, path.relative_to(folder))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


def _save_cifar10(root, monkeypatch):
    """Save files in the format of CIFAR-10, with a few random images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        data = generator.integers(0, 255, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [0, 1, 2, 9]}))
    names = {"label_names": [f"class {number}" for number in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    # The check compares the files with the original download.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)


@pytest.mark.parametrize("is_tar", [False, True])
@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_validation_images_have_the_labels_of_the_training_classes(tmp_path, validation, is_tar):
    root = tmp_path / "Bilder mit Leerzeichen é"
    _save_images(root / "train", CLASSES, number=2)
    _save_images(root / validation, ("dog", "owl"), number=1)
    if is_tar:
        _pack(root / "train")
        _pack(root / validation)
    datasets = create_datasets(TrainConfig(data_dir=str(root)))
    assert (len(datasets.train), datasets.num_classes) == (6, 3)
    assert [label for _, label in map(datasets.validation.__getitem__, range(2))] == [1, 2]
    assert datasets.train[0][0].size == (48, 40)


def test_a_folder_of_images_trains(tmp_path, capsys):
    for split in ("train", "val"):
        _save_images(tmp_path / "data é 1" / split, CLASSES, number=3)
    flags = ["--data-dir", str(tmp_path / "data é 1"), "--experiment", "ein Lauf é"]
    flags += ["-b", "4", "--epochs", "1", "--amp", "--clip-grad", "1", "--no-plot"]
    flags += ["--schedule", "constant:rate=0.5", "--output", str(tmp_path / "alle Läufe")]
    assert main([*TINY, *flags]) == 0
    saved = content(tmp_path / "alle Läufe" / "ein Lauf é" / "last.pt")
    assert saved["step"] == 2
    assert saved["state_dict"]["fc.weight"].shape[0] == 3
    assert "9 training images, 2 steps an epoch" in capsys.readouterr().out


def test_a_torchvision_set_on_disk_trains(tmp_path, monkeypatch):
    _save_cifar10(tmp_path / "data", monkeypatch)
    flags = ["--dataset", "torch/cifar10", "--data-dir", str(tmp_path / "data"), "-b", "4"]
    flags += ["--epochs", "1", "--max-steps", "1", "--output", str(tmp_path), "--experiment", "a"]
    assert main([*TINY, *flags]) == 0
    saved = content(tmp_path / "a" / "last.pt")
    assert saved["state_dict"]["fc.weight"].shape[0] == 10


def test_torchvision_images_are_rgb_and_split_as_asked(tmp_path, monkeypatch):
    _save_cifar10(tmp_path, monkeypatch)
    datasets = create_datasets(TrainConfig(dataset="torch/cifar10", data_dir=str(tmp_path)))
    assert (len(datasets.train), len(datasets.validation), datasets.num_classes) == (20, 4, 10)
    assert [label for _, label in map(datasets.train.__getitem__, range(4))] == [0, 1, 2, 9]
    image, _ = datasets.validation[0]
    assert (image.mode, image.size) == ("RGB", (32, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "torch/cifar10"}, "needs --data-dir: nothing is downloaded"),
        ({"dataset": "cifar10", "data_dir": "."}, "expected torch/NAME"),
        ({"dataset": "wds/a", "data_dir": "."}, "Streams do not work: they have no fixed order"),
        ({"dataset": "torch/cifar11", "data_dir": "."}, "Unknown torchvision dataset cifar11"),
        ({"dataset": "torch/cifar10", "data_dir": "."}, "Dataset not found"),
        ({"data_dir": "nowhere"}, "--data-dir nowhere: no such folder"),
    ],
)
def test_a_dataset_that_is_not_there_is_named(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=message):
        create_datasets(TrainConfig(**settings))


def test_validation_images_cannot_be_trained_on_by_mistake(tmp_path, monkeypatch):
    _save_cifar10(tmp_path, monkeypatch)
    config = TrainConfig(dataset="torch/cifar10", data_dir=str(tmp_path), train_split="tran")
    with pytest.raises(CommandError, match="--train-split tran: these are not the training images"):
        create_datasets(config)


def test_digits_are_split_once_and_for_all():
    train, validation = Digits(train=True), Digits(train=False)
    assert (len(train), len(validation)) == (1437, 360)
    labels = [label for _, label in (validation[index] for index in range(360))]
    assert all(35 <= labels.count(digit) <= 37 for digit in range(10))
    image, _ = train[0]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert image.tobytes() == Digits(train=True)[0][0].tobytes()


def _loaders(rank=0, world_size=1, **settings):
    config = TrainConfig(**settings)
    processes = Processes(rank=rank, world_size=world_size)
    return create_loaders(config, create_datasets(config), DATA_CONFIG, processes)


def test_processes_share_the_batches_of_one(monkeypatch):
    whole = _loaders(batch_size=8)
    parts = [_loaders(rank, 2, batch_size=4) for rank in range(2)]
    assert [part.images_per_step for part in parts] == [8, 8]
    assert {part.steps_per_epoch for part in parts} == {whole.steps_per_epoch}
    for loaders in (whole, *parts):
        loaders.sampler.set_epoch(1, skip=178 * 8)
    batches = [images for images, _ in whole.train]
    shared = [
        torch.stack([left, right], dim=1).flatten(0, 1)
        for (left, _), (right, _) in zip(*(part.train for part in parts), strict=True)
    ]
    assert len(batches) == whole.steps_per_epoch - 178 == 1
    assert torch.equal(batches[0], shared[0])
    # Validation sees each image once, although 360 is not a multiple of 7 processes.
    counts = [sum(len(labels) for _, labels in _loaders(rank, 7).validation) for rank in range(7)]
    assert sum(counts) == 360
    assert max(counts) - min(counts) == 1


def test_an_epoch_has_whole_steps_alone():
    loaders = _loaders(batch_size=64, grad_accum_steps=5)
    assert (loaders.steps_per_epoch, loaders.images_per_step) == (4, 320)
    assert len(list(loaders.train)) == 20
    with pytest.raises(CommandError, match="--batch-size 500 in 2 batches in 3 processes is more"):
        _loaders(world_size=3, batch_size=500, grad_accum_steps=2)


def test_mixup_depends_on_seed_and_step_alone():
    config = TrainConfig(mixup=0.5, cutmix=1.0, smoothing=0.1, aug_kwargs={"mixup_off_epoch": 3})
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])

    def mix(epoch, *key, seed=42):
        torch.manual_seed(0)
        mixup = create_mixup(replace(config, seed=seed), num_classes=4)
        return mixup(images.clone(), labels, epoch, *key)

    assert all(map(torch.equal, mix(0, 7, 0), mix(1, 7, 0)))
    others = [mix(0, 8, 0), mix(0, 7, 1), mix(0, 7, 0, seed=1)]
    assert not any(torch.equal(mix(0, 7, 0)[0], other) for other, _ in others)
    mixed, distribution = mix(0, 7, 0)
    assert not torch.equal(mixed, images)
    torch.testing.assert_close(distribution.sum(dim=1), torch.ones(4))
    # After mixup's last epoch the images stay as they are; labels are still smoothed.
    ended, distribution = mix(3, 7, 0)
    assert torch.equal(ended, images)
    assert distribution.max() == pytest.approx(0.925)
    assert create_mixup(TrainConfig(), num_classes=4) is None


@pytest.mark.parametrize("path", ["a", "b"])
def test_a_split_name_of_ones_own_has_no_synonyms(tmp_path, path):
    _save_images(tmp_path / "a", CLASSES, number=1)
    _save_images(tmp_path / "b", CLASSES, number=1)
    datasets = create_datasets(TrainConfig(data_dir=str(tmp_path), train_split=path, val_split="b"))
    assert datasets.train.root.name == path
