"""`gpu-study`: its data, its runs, its summary, and a rehearsal on a CPU."""

import json
import math
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from bench_runs import parse

from benchmarks.gpu import cifar, study
from benchmarks.gpu.learner import Learner, Recipe
from benchmarks.gpu.study import summaries
from benchmarks.study.data import CLASSES
from ssprop_fx import SparsityScheduler, constant


def run_row(row: str, seed: int, accuracy: float, seconds: float) -> dict:
    epochs = int(row.split()[1]) if row.startswith("dense") else 20
    kept = 1.0 if row.startswith("dense") else 0.5
    figures = {"accuracy": accuracy, "seconds": seconds, "kept": kept}
    return {"row": row, "epochs": epochs, "seed": seed, **figures}


def test_rows_gain_over_dense_training_of_the_same_time() -> None:
    rows = [
        *(run_row("dense 20", seed, 94.0 + seed, 40) for seed in (0, 1)),
        *(run_row("dense 10", seed, 92.0 + seed, 20) for seed in (0, 1)),
        *(run_row("rule", seed, 94.0 + seed, 30) for seed in (0, 1)),
        # This seed was cut off.
        run_row("dense 20", 2, 0.0, 1),
    ]
    long, short, rule = summaries(rows)
    assert (long.accuracy, long.seeds, long.cost, long.gain) == (94.5, 2, 20, 0)
    assert (short.cost, short.gain) == (10, 0)
    # Half way between the two, dense training reaches 93.5.
    assert (rule.cost, rule.gain, rule.kept) == (15, 1.0, 0.5)
    assert rule.deviation == pytest.approx(math.sqrt(0.5))


def test_a_single_cut_seed_is_shown() -> None:
    (only,) = summaries([run_row("dense 20", 1, 90.0, 40)])
    assert (only.accuracy, only.deviation) == (90, 0)


def test_each_seed_is_a_run_of_its_own() -> None:
    """The same seed gives the same weights, also after another run of the same network."""
    images = cifar.digits()
    recipe = Recipe(batch_size=320, lr=0.05, backend="aot_eager")
    learner = Learner(images, recipe, True, SparsityScheduler(constant(0.5)))
    first, other, again = (learner.train(1, seed) for seed in (1, 2, 1))
    assert first.accuracy == again.accuracy
    assert first.accuracy != other.accuracy
    assert first.kept == 0.5
    dense = Learner(images, recipe, True, None).train(1, 1)
    assert dense.kept == 1
    assert dense.accuracy != first.accuracy


def test_batches_are_windows_of_the_images() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8).expand(-1, 3, -1, -1)
    labels = torch.arange(4)
    data = cifar.Images(images, labels, images, labels)
    (batch,) = [images for images, found in data.epoch(3) if len(found) == 3]
    assert batch.shape == (3, 3, 8, 8)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    # Neighbours in a row differ by one step of the image, to the right or, flipped, to the left;
    # at the mirrored edge the direction turns.
    steps = (batch[:, 0, :, 1:] - batch[:, 0, :, :-1]) * (255 * cifar._STD)
    assert set(steps.round().flatten().tolist()) <= {1.0, -1.0}
    (whole,) = [images for images, _ in data.tests(4)]
    pixels = whole * (255 * cifar._STD) + 255 * cifar._MEAN
    assert torch.equal(pixels.round().byte(), images)


def test_packed_images_are_those_of_the_archive(tmp_path: Path) -> None:
    from PIL import Image

    archive = tmp_path / "cifar10.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for number, name in enumerate(CLASSES):
            for split, count in (("train", 2), ("test", 1)):
                for index in range(count):
                    jpeg = BytesIO()
                    shade = 20 * number + index
                    Image.new("RGB", (32, 32), (shade, shade, shade)).save(jpeg, "JPEG")
                    file.writestr(f"{split}/{name}/{index}.jpg", jpeg.getvalue())
    cifar.pack(archive, tmp_path / "cifar10.pt")
    images = cifar.load(tmp_path / "cifar10.pt")
    assert (images.train.shape, images.test.shape) == ((20, 3, 32, 32), (10, 3, 32, 32))
    assert images.train_labels.tolist() == [label for label in range(10) for _ in range(2)]
    shades = images.train[:, 0, 0, 0].tolist()
    assert shades == [20 * number + index for number in range(10) for index in range(2)]
    with zipfile.ZipFile(archive, "w"):
        pass
    with pytest.raises(ValueError, match="has no images in train/airplane"):
        cifar.pack(archive, tmp_path / "none.pt")


def test_the_study_needs_data(tmp_path: Path) -> None:
    args = parse(["gpu-study", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="--data must be a file"):
        args.run(args)


@pytest.mark.slow
def test_a_rehearsal_of_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--device", "cpu", "--tiny", "--minutes", "20", "--output", str(tmp_path / "study")]
    args = parse(["gpu-study", *where])
    with pytest.raises(SystemExit) as end:
        args.run(args)
    assert end.value.code == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert all(f"\n{rule} " in printed for rule in study.RULES)
    content = json.loads((tmp_path / "study" / "gpu-seed3.json").read_text())
    assert len(content["rows"]) == len(study.EPOCHS) + len(study.RULES)
    assert sys.executable in printed
