"""A run that was killed or interrupted resumes as if it had never stopped."""

import os
import random
import signal
import subprocess
import sys

import pytest
from training_runs import STEPS_PER_EPOCH, TINY, TWO_PHASES, assert_same_run, content, rows

from ssprop_fx.cli.app import main
from ssprop_fx.training import loop, run

# Runs the command, and kills itself before the step given by the first argument.
KILLED = """
import os, signal, sys
from ssprop_fx.cli.app import main
from ssprop_fx.training import loop

step = int(sys.argv[1])
train_step = loop.Trainer._train_step

def killed(self, batches):
    if self._state.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, batches)

loop.Trainer._train_step = killed
sys.exit(main(sys.argv[2:]))
"""


def _run_and_kill(step, arguments):
    command = [sys.executable, "-c", KILLED, str(step), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_kill_9_at_any_step_and_resume_end_with_the_weights_of_the_whole_run(whole_run, tmp_path):
    step = random.SystemRandom().randrange(2 * STEPS_PER_EPOCH)
    print(f"killed before step {step}")
    flags = ["--output", str(tmp_path), "--experiment", "a", "--checkpoint-every", "3"]
    _run_and_kill(step, [*TWO_PHASES, *flags])
    saved = content(tmp_path / "a" / "last.pt")["step"]
    assert saved == max(step // 3 * 3, step // STEPS_PER_EPOCH * STEPS_PER_EPOCH)
    assert main(["train", "--resume", str(tmp_path / "a")]) == 0
    assert_same_run(whole_run, tmp_path / "a")


VARIANTS = {
    "everything": [
        *TWO_PHASES,
        *("--opt", "adamw", "--lr", "1e-3", "--model-ema", "--model-ema-decay", "0.9"),
        *("--mixup", "0.2", "--cutmix", "1", "--grad-accum-steps", "2", "-b", "64"),
        *("--clip-grad", "1", "--reprob", "0.3", "--aa", "rand-m5", "--sched", "step"),
    ],
    "float16": [*TWO_PHASES, "--amp", "--amp-dtype", "float16", "--workers", "2"],
    "linear layers": [
        *TWO_PHASES,
        *("--model", "test_vit", "--amp", "--warmup-epochs", "1", "--schedule"),
        "cosine:start=0,end=0.8,steps=2ep",
    ],
    "memory": [
        *TWO_PHASES,
        "--memory",
        "0.9",
        "--schedule",
        "constant:rate=0.8",
    ],
    "adaptive": [
        *(*TWO_PHASES, "-b", "64", "--sparsity-warmup-epochs", "0", "--schedule"),
        *("constant:rate=0.8", "--controller", "kept_mass:target=0.9,budget=0.6"),
    ],
    "rule for samples": [*TINY, "--epochs", "2", "--recipe", "samples", "--drop-path", "0.1"],
    # The tests' own process has no gate (see `no_gate`); the killed processes would have one.
    "inductor": [
        *(*TWO_PHASES, "--no-gate", "--compile-backend", "inductor"),
        *("--model-kwargs", "drop_rate=0.1"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_kill_9_twice_whatever_is_on(tmp_path, name):
    """Kill it once in the dense and once in the sparse epoch."""
    flags = [*VARIANTS[name], "--output", str(tmp_path)]
    assert main([*flags, "--experiment", "whole"]) == 0
    steps = [
        random.SystemRandom().randrange(begin, begin + STEPS_PER_EPOCH)
        for begin in (0, STEPS_PER_EPOCH)
    ]
    print(f"killed before steps {steps}")
    killed = [*flags, "--experiment", "killed", "--checkpoint-every", "2"]
    for step in steps:
        _run_and_kill(step, killed)
        killed = ["train", "--resume", str(tmp_path / "killed")]
    assert main(killed) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_kill_9_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from ssprop_fx.training.files import replace_file

def write(file):
    file.write(b"half of the n")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

replace_file(Path(sys.argv[1]), write)
"""
    assert main([*TINY, "--output", str(tmp_path), "--experiment", "a", "--max-steps", "1"]) == 0
    folder = tmp_path / "a"
    before = (folder / "last.pt").read_bytes()
    done = subprocess.run([sys.executable, "-c", code, str(folder / "last.pt")])
    assert done.returncode == -signal.SIGKILL
    assert (folder / "last.pt").read_bytes() == before
    assert [path.name for path in folder.glob(".*")] != []
    # A killed process can leave rows of later steps, and half a row.
    with (folder / "steps.csv").open("a") as file:
        file.write("1,0,2.3,0.0,0.0,0.05,7.5,0\n2,0,2.")
    assert main(["train", "--resume", str(folder), "--max-steps", "2"]) == 0
    assert [path.name for path in folder.glob(".*")] == []
    assert [row["step"] for row in rows(folder / "steps.csv")] == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [STEPS_PER_EPOCH + 4, STEPS_PER_EPOCH - 1])
def test_ctrl_c_and_resume_end_with_the_weights_of_the_whole_run(
    whole_run, tmp_path, monkeypatch, capsys, stop_at
):
    flags = ["--output", str(tmp_path), "--experiment", "a"]
    train_step = loop.Trainer._train_step
    # A shell's background jobs ignore SIGINT, so the handler may not be the default.
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(self, batches):
        if self._state.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", interrupted)
        assert main([*TWO_PHASES, *flags]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    path = tmp_path / "a" / "last.pt"
    assert f"ssprop-fx train --resume {path}" in capsys.readouterr().err.splitlines()[-1]
    assert content(path)["step"] == stop_at + 1

    assert main(["train", "--resume", str(path)]) == 0
    assert_same_run(whole_run, path.parent)


def test_a_signal_during_validation_leaves_a_checkpoint(tmp_path, monkeypatch):
    evaluate = run.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(run, "evaluate", interrupted)
    flags = ["--schedule", "none", "--max-steps", "1", "--output", str(tmp_path)]
    assert main([*TINY, *flags, "--experiment", "a"]) == 128 + signal.SIGTERM
    assert (tmp_path / "a" / "last.pt").exists()
    assert rows(tmp_path / "a" / "summary.csv") == []


def test_ctrl_c_that_breaks_a_step_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    flags = ["--schedule", "none", "--output", str(tmp_path), "--experiment", "a", "--epochs", "1"]
    assert main([*TINY, *flags, "--max-steps", "1"]) == 0
    before = (tmp_path / "a" / "last.pt").read_bytes()

    def broken(self, batches):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("the compiler was killed")

    monkeypatch.setattr(loop.Trainer, "_train_step", broken)
    resume = ["train", "--resume", str(tmp_path / "a"), "--max-steps", "2"]
    assert main(resume) == 130
    assert "interrupted in step 1, which was compiling; continue" in capsys.readouterr().err
    assert (tmp_path / "a" / "last.pt").read_bytes() == before
