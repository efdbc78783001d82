"""Several processes, as torchrun starts them."""

import subprocess
import sys

import pytest
import torch
from training_runs import TINY, TWO_PHASES, assert_same_run, content, is_equal, rows

from ssprop_fx.cli.app import main
from ssprop_fx.training.checkpoint import load_checkpoint, restore
from ssprop_fx.training.distributed import Processes
from ssprop_fx.training.errors import CommandError

# Runs the command, and saves each process's weights after every checkpoint.
SCRIPT = """
import os, sys, torch
from ssprop_fx.cli.app import main
from ssprop_fx.training import run

save = run.save_checkpoint

def save_of_each(path, state, config, processes):
    save(path, state, config, processes)
    torch.save(state.model.state_dict(), f"{sys.argv[1]}/rank{processes.rank}.pt")

run.save_checkpoint = save_of_each
sys.exit(main(sys.argv[2:]))
"""
# No batch normalisation: its statistics would cover only one process's images.
VIT = ["--model", "test_vit", "--epochs", "1", "--max-steps", "6", "--no-plot"]


def _torchrun(folder, *flags, ok=True):
    (folder / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", "2", str(folder / "script.py"), str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert (done.returncode == 0) == ok, done.stderr
    return done


def _weights_of_ranks(folder):
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return [
        {name: value for name, value in weights.items() if "running" not in name}
        for weights in ranks
    ]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["none", "constant:rate=0.8"])
def test_two_processes_train_as_one_does_with_batches_twice_as_large(tmp_path, schedule):
    flags = ["--schedule", schedule, "--ranks", "shared", "--output", str(tmp_path), "--experiment"]
    assert main([*TINY, *VIT, *flags, "one"]) == 0
    done = _torchrun(tmp_path, *TINY, *VIT, *flags, "two", "-b", "64")
    assert done.stdout.count("1437 training images, 11 steps an epoch") == 1
    one, two = (content(tmp_path / name / "last.pt") for name in ("one", "two"))
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-3, atol=1e-5)
    (left,), (right,) = (rows(tmp_path / name / "summary.csv") for name in ("one", "two"))
    for name in ("train_loss", "eval_loss"):
        assert float(left[name]) == pytest.approx(float(right[name]), rel=1e-4)
    # Accuracy counts over both processes, each image once.
    assert abs(float(left["eval_top1"]) - float(right["eval_top1"])) < 1
    assert is_equal(*_weights_of_ranks(tmp_path))


@pytest.mark.slow
def test_sparse_phases_leave_the_processes_with_equal_weights(tmp_path):
    flags = ["--output", str(tmp_path), "-b", "32", "--grad-accum-steps", "2", "--experiment"]
    done = _torchrun(tmp_path, *TWO_PHASES, *flags, "whole", "--model-ema")
    first, second = _weights_of_ranks(tmp_path)
    assert is_equal(first, second)
    steps = rows(tmp_path / "whole" / "steps.csv")
    assert [row["drop_rate"] for row in steps] == ["0.0"] * 11 + ["0.8"] * 11
    epochs = rows(tmp_path / "whole" / "summary.csv")
    assert float(epochs[1]["train_loss"]) < float(epochs[0]["train_loss"])
    assert done.stdout.count("epoch   0") == 1

    # Interrupted in the sparse phase: each process restores its own random state.
    _torchrun(tmp_path, *TWO_PHASES, *flags, "parts", "--model-ema", "--max-steps", "14")
    resume = ["train", "--resume", str(tmp_path / "parts")]
    assert len(load_checkpoint(tmp_path / "parts" / "last.pt")["rng"]) == 2
    assert main(resume) == 2  # as one process
    _torchrun(tmp_path, *resume, "--max-steps", "22")
    # The interrupted epoch was validated in the middle as well as at its end.
    assert_same_run(tmp_path / "whole", tmp_path / "parts", but={"best_top1", "best_epoch"})


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path):
    done = _torchrun(tmp_path, *TINY, "--model", "resnet81", "--output", str(tmp_path), ok=False)
    assert done.stderr.count("ssprop-fx: error: --model resnet81: unknown") == 1


def test_one_process_alone_reduces_nothing():
    alone = Processes()
    assert alone.is_first
    assert alone.sum(1.0, 2.0) == alone.mean(1.0, 2.0) == [1.0, 2.0]
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert alone.gather("a") == ["a"]


def test_a_run_continues_with_as_many_processes_as_before(whole_run):
    saved = load_checkpoint(whole_run / "last.pt")
    with pytest.raises(CommandError, match=r"had 1 processes.* and has 2 now"):
        restore(None, saved, Processes(world_size=2))
