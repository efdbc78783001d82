import os
import subprocess
import sys

import pytest
import timm
import torch
from timm.models import load_checkpoint as load_timm_checkpoint
from training_runs import STEPS_PER_EPOCH, TINY, TWO_PHASES, rows

from ssprop_fx.cli.app import main


def test_a_run_has_a_dense_and_a_sparse_phase(whole_run):
    folder = whole_run
    steps, epochs = rows(folder / "steps.csv"), rows(folder / "summary.csv")
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
        *("best.pt", "config.yaml", "last.pt", "plot.png", "sites.txt", "steps.csv"),
        "summary.csv",
    ]


def test_the_mean_kept_mass_of_each_step_is_noted(whole_run):
    masses = [float(row["kept_mass"]) for row in rows(whole_run / "steps.csv")]
    assert masses[:STEPS_PER_EPOCH] == [1.0] * STEPS_PER_EPOCH
    assert all(0.2 < mass < 1 for mass in masses[STEPS_PER_EPOCH:])


def test_a_checkpoint_is_plain_and_timm_reads_it(whole_run):
    path = whole_run / "last.pt"
    content = torch.load(path, weights_only=True)
    model = timm.create_model("test_resnet", num_classes=10)
    load_timm_checkpoint(model, str(path))
    assert all(torch.equal(v, content["state_dict"][k]) for k, v in model.state_dict().items())
    assert (content["epoch"], content["step"]) == (2, 2 * STEPS_PER_EPOCH)
    assert content["sparsity_scheduler"] == {"last_step": 2 * STEPS_PER_EPOCH}
    assert content["config"]["model"] == content["arch"] == "test_resnet"


def test_max_steps_can_be_raised_on_resume(tmp_path):
    flags = ["--schedule", "none", "--output", str(tmp_path), "--experiment", "a", "--epochs", "1"]
    assert main([*TINY, *flags, "--max-steps", "2"]) == 0
    assert main(["train", "--output", str(tmp_path), "--resume", "--max-steps", "5"]) == 0
    assert len(rows(tmp_path / "a" / "steps.csv")) == 5
    (row,) = rows(tmp_path / "a" / "summary.csv")
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


def test_a_folder_that_holds_a_run_is_not_overwritten(whole_run, capsys):
    before = (whole_run / "last.pt").read_bytes()
    flags = ["--output", str(whole_run.parent), "--experiment", "whole"]
    assert main([*TWO_PHASES, *flags]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", str(whole_run), "--lr", "0.3"]) == 2
    assert "--lr cannot change on --resume" in capsys.readouterr().err
    assert (whole_run / "last.pt").read_bytes() == before


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
        "from ssprop_fx.cli.app import main\n"
        "sys.exit(main(['train']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("is missing: pip install ssprop-fx[train]")
    assert done.stderr.count("\n") == 1
