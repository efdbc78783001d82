import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import load_checkpoint as load_timm_checkpoint

from ssprop_fx.cli import main
from ssprop_fx.training import loop
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.data import Digits, create_datasets

STEPS_PER_EPOCH = 11
TINY = [
    *("train", "--model", "test_resnet", "--img-size", "32", "-b", "128", "--device", "cpu"),
    *("--compile-backend", "aot_eager", "--channel-multiple", "8", "--min-channels", "16"),
]


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Two epochs, the first dense and the second sparse; drop path draws on the generators."""
    output = tmp_path_factory.mktemp("runs")
    flags = ["--epochs", "2", "--drop-path", "0.1", "--output", str(output)]
    assert main([*TINY, *flags, "--experiment", "whole"]) == 0
    return output, flags


def test_a_run_has_a_dense_and_a_sparse_phase(whole_run):
    folder = whole_run[0] / "whole"
    steps, epochs = _rows(folder / "steps.csv"), _rows(folder / "summary.csv")
    assert [int(row["step"]) for row in steps] == list(range(2 * STEPS_PER_EPOCH))
    assert [float(row["drop_rate"]) for row in epochs] == pytest.approx([0.0, 0.8])
    assert [row["timed"] for row in steps] == (["0"] * 2 + ["1"] * (STEPS_PER_EPOCH - 2)) * 2
    assert [row["sparse_ms"] == "nan" for row in epochs] == [True, False]
    assert float(epochs[0]["backward_saved"]) == 0
    assert 0.3 < float(epochs[1]["backward_saved"]) < 0.8
    assert float(epochs[1]["train_loss"]) < float(epochs[0]["train_loss"])
    assert float(epochs[1]["eval_top1"]) > 30
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "sparse" in (folder / "sites.txt").read_text()
    assert sorted(os.listdir(folder)) == [
        *("best.pt", "last.pt", "plot.png", "sites.txt", "steps.csv", "summary.csv")
    ]


def test_a_checkpoint_is_plain_and_timm_reads_it(whole_run):
    path = whole_run[0] / "whole" / "last.pt"
    content = torch.load(path, weights_only=True)
    model = timm.create_model("test_resnet", num_classes=10)
    load_timm_checkpoint(model, str(path))
    assert all(torch.equal(v, content["state_dict"][k]) for k, v in model.state_dict().items())
    assert (content["epoch"], content["step"]) == (2, 2 * STEPS_PER_EPOCH)
    assert content["sparsity_scheduler"] == {"last_step": 2 * STEPS_PER_EPOCH}
    assert content["config"]["model"] == content["arch"] == "test_resnet"


@pytest.mark.parametrize("stop_at", [STEPS_PER_EPOCH + 4, STEPS_PER_EPOCH - 1])
def test_ctrl_c_and_resume_end_with_the_weights_of_the_whole_run(
    whole_run, monkeypatch, capsys, stop_at
):
    output, flags = whole_run
    name = f"stopped-{stop_at}"
    train_step = loop.Trainer._train_step

    def interrupted(self, images, labels):
        if self._state.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", interrupted)
        assert main([*TINY, *flags, "--experiment", name]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    path = output / name / "last.pt"
    assert f"ssprop-fx train --resume {path}" in capsys.readouterr().err.splitlines()[-1]
    assert torch.load(path, weights_only=True)["step"] == stop_at + 1

    assert main(["train", "--resume", str(path)]) == 0
    whole, resumed = _weights(output / "whole" / "last.pt"), _weights(path)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for file, columns in (
        ("steps.csv", ("step", "epoch", "loss", "drop_rate", "backward_saved", "lr")),
        ("summary.csv", ("epoch", "train_loss", "eval_loss", "eval_top1")),
    ):
        pairs = zip(_rows(output / "whole" / file), _rows(output / name / file), strict=True)
        assert all(left[key] == right[key] for left, right in pairs for key in columns)


def test_a_signal_during_validation_leaves_a_checkpoint(tmp_path, monkeypatch):
    evaluate = loop.Trainer.evaluate

    def interrupted(self, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, stop)

    monkeypatch.setattr(loop.Trainer, "evaluate", interrupted)
    flags = ["--schedule", "none", "--max-steps", "1", "--output", str(tmp_path)]
    assert main([*TINY, *flags, "--experiment", "a"]) == 128 + signal.SIGTERM
    assert (tmp_path / "a" / "last.pt").exists()
    assert _rows(tmp_path / "a" / "summary.csv") == []


def test_ctrl_c_that_breaks_a_step_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    flags = ["--schedule", "none", "--output", str(tmp_path), "--experiment", "a", "--epochs", "1"]
    assert main([*TINY, *flags, "--max-steps", "1"]) == 0
    before = (tmp_path / "a" / "last.pt").read_bytes()

    def broken(self, images, labels):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the compiler was killed")

    monkeypatch.setattr(loop.Trainer, "_train_step", broken)
    resume = ["train", "--resume", str(tmp_path / "a"), "--max-steps", "2"]
    assert main(resume) == 130
    assert "interrupted in step 1, which was compiling; continue" in capsys.readouterr().err
    assert (tmp_path / "a" / "last.pt").read_bytes() == before


def _save_images(folder, classes, number):
    generator = np.random.default_rng(0)
    for label in classes:
        (folder / label).mkdir(parents=True)
        for index in range(number):
            pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index}.png")


def test_a_folder_of_images_trains(tmp_path, capsys):
    for split in ("train", "val"):
        _save_images(tmp_path / "data" / split, ("cat", "dog", "owl"), number=3)
    flags = ["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path), "--experiment", "a"]
    flags += ["-b", "4", "--epochs", "1", "--amp", "--clip-grad", "1", "--no-plot"]
    flags += ["--schedule", "constant:rate=0.5"]
    assert main([*TINY, *flags]) == 0
    content = torch.load(tmp_path / "a" / "last.pt", weights_only=True)
    assert content["step"] == 2
    assert content["state_dict"]["fc.weight"].shape[0] == 3
    assert "9 training images, 2 steps an epoch" in capsys.readouterr().out


@pytest.mark.parametrize("validation", ["val", "validation", "test"])
def test_validation_images_have_the_labels_of_the_training_classes(tmp_path, validation):
    _save_images(tmp_path / "train", ("cat", "dog", "owl"), number=2)
    _save_images(tmp_path / validation, ("dog", "owl"), number=1)
    datasets = create_datasets(TrainConfig(data_dir=str(tmp_path)))
    assert (len(datasets.train), datasets.num_classes) == (6, 3)
    assert [label for _, label in map(datasets.validation.__getitem__, range(2))] == [1, 2]


def test_digits_are_split_once_and_for_all():
    train, validation = Digits(train=True), Digits(train=False)
    assert (len(train), len(validation)) == (1437, 360)
    labels = [label for _, label in (validation[index] for index in range(360))]
    assert all(35 <= labels.count(digit) <= 37 for digit in range(10))
    image, _ = train[0]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert image.tobytes() == Digits(train=True)[0][0].tobytes()


def test_max_steps_can_be_raised_on_resume(tmp_path):
    flags = ["--schedule", "none", "--output", str(tmp_path), "--experiment", "a", "--epochs", "1"]
    assert main([*TINY, *flags, "--max-steps", "2"]) == 0
    assert main(["train", "--output", str(tmp_path), "--resume", "--max-steps", "5"]) == 0
    assert len(_rows(tmp_path / "a" / "steps.csv")) == 5
    (row,) = _rows(tmp_path / "a" / "summary.csv")
    assert (row["epoch"], row["step"]) == ("0", "5")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet81"], "--model resnet81: unknown; did you mean resnet"),
        (["--opt", "sdg"], "--opt sdg: unknown; did you mean sgd"),
        (["--schedule", "bar:rate=0.8"], "bar needs period="),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--lr", "-1"], "--lr must be above 0, got -1.0"),
        (["--batch-size", "0"], "--batch-size must be above 0"),
        (["--batch-size", "5000"], "--batch-size 5000 is more than the 1437 training images"),
        (["--smoothing", "1"], "--smoothing must be in [0, 1)"),
        (["--num-classes", "4"], "--num-classes 4 is fewer than the 10 of the dataset"),
        (["--mean", "0.5", "0.5"], "--mean must be one or three numbers"),
        (["--warmup-epochs", "10"], "--warmup-epochs must be below --epochs"),
        (["--compile-mode", "default"], "--compile-mode is Inductor's"),
        (["--compile-backend", "fast"], "choose from"),
        (["--device", "gpu"], "--device gpu: torch cannot use it here"),
        (["--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
        (["--resume", "nowhere.pt"], "--resume nowhere.pt: no such file"),
        (["--output", "nowhere", "--resume"], "--resume: no run in nowhere has a last.pt"),
        (["--speed", "high"], "unrecognized arguments: --speed high"),
        (["--model", "test_vit", "--opt", "lbfgs", "--device", "cpu"], "--opt lbfgs: unknown"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *flags]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("ssprop-fx: error: ")
    assert err.count("\n") == 1
    assert out == ""
    assert os.listdir(tmp_path) == []


def test_folders_without_images_are_named(tmp_path, capsys):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    flags = [*TINY, "--data-dir", str(tmp_path)]
    assert main(flags) == 2
    assert f"{tmp_path / 'train'}: no images found" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "0.png")
    assert main(flags) == 2
    err = capsys.readouterr().err
    assert "--val-split validation: no folder validation or val" in err
    assert "it has train" in err


def test_a_folder_that_holds_a_run_is_not_overwritten(whole_run, capsys):
    output, flags = whole_run
    before = (output / "whole" / "last.pt").read_bytes()
    assert main([*TINY, *flags, "--experiment", "whole"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", str(output / "whole"), "--lr", "0.3"]) == 2
    assert "--lr cannot change on --resume" in capsys.readouterr().err
    assert (output / "whole" / "last.pt").read_bytes() == before


def test_no_command_and_version(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("ssprop-fx ")


def test_without_the_extra_the_command_imports_and_says_what_to_install():
    code = (
        "import sys\n"
        "names = ('timm', 'torchvision', 'tqdm', 'matplotlib', 'sklearn')\n"
        "sys.modules.update(dict.fromkeys(names))\n"
        "from ssprop_fx.cli import main\n"
        "sys.exit(main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("is missing: pip install ssprop-fx[train]")
    assert done.stderr.count("\n") == 1
