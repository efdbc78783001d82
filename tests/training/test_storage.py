"""What a run writes, and what happens when a write fails."""

import errno
import math
import os
import sys
import tempfile

import pytest
import torch
from training_runs import TINY, assert_same_run, content, rows

from ssprop_fx.cli.app import main
from ssprop_fx.training import checkpoint
from ssprop_fx.training.records.logs import Records
from ssprop_fx.training.records.rows import EpochRow, StepRow, read_rows

FLAGS = [*TINY, "--epochs", "1", "--max-steps", "4", "--checkpoint-every", "1"]
FLAGS += ["--schedule", "constant:rate=0.5", "--no-plot"]


def _no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read_only(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("owner", "name", "failure", "message"),
    [
        (torch, "save", _no_space, "No space left on device"),
        pytest.param(
            tempfile, "mkstemp", _read_only, "Read-only file system", marks=pytest.mark.slow
        ),
    ],
)
def test_a_disk_that_fails_is_one_line_and_the_checkpoint_before_it_survives(
    owner, name, failure, message, tmp_path, monkeypatch, capsys
):
    flags = ["--output", str(tmp_path), "--experiment"]
    assert main([*FLAGS, *flags, "whole"]) == 0
    save, calls = checkpoint.save_checkpoint, []

    def save_until_it_fails(*args):
        calls.append(args)
        with monkeypatch.context() as patch:
            if len(calls) == 4:
                patch.setattr(owner, name, failure)
            return save(*args)

    with monkeypatch.context() as patch:
        patch.setattr("ssprop_fx.training.run.save_checkpoint", save_until_it_fails)
        capsys.readouterr()
        assert main([*FLAGS, *flags, "ein Lauf"]) == 1
    folder = tmp_path / "ein Lauf"
    err = capsys.readouterr().err
    assert f"{folder}: {message}; earlier checkpoints are unchanged" in err
    assert f"ssprop-fx train --resume '{folder / 'last.pt'}'" in err
    assert err.count("\n") == 1
    # The first call is before the first step, the fourth after the third.
    assert content(folder / "last.pt")["step"] == 2
    assert list(folder.glob(".*")) == []
    assert main(["train", "--resume", str(folder)]) == 0
    assert_same_run(tmp_path / "whole", folder)


def test_a_folder_that_cannot_be_written_to_is_named_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "mkstemp", _read_only)
    assert main([*FLAGS, "--output", str(tmp_path), "--experiment", "a"]) == 1
    assert f"{tmp_path / 'a'}: Read-only file system" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*FLAGS, "--output", str(tmp_path / "file")]) == 2
    assert f"--output {tmp_path / 'file'}: Not a directory" in capsys.readouterr().err


def test_a_limit_that_the_system_sets_is_an_os_error(tmp_path):
    """When a file cannot grow, torch's writer raises its own error on top of the OSError."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "last.pt").write_bytes(b"old")
    large = {"weight": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.replace_file(
                tmp_path / "last.pt", lambda file: checkpoint._save(large, file)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_half_a_row_is_left_out(tmp_path):
    row = StepRow(
        step=0,
        epoch=0,
        loss=1 / 3,
        drop_rate=0.0,
        backward_saved=math.nan,
        lr=1e-5,
        ms=2.0,
        timed=1,
    )
    records = Records(tmp_path)
    records.add_step(row)
    records.close()
    whole = (tmp_path / "steps.csv").read_text()
    (tmp_path / "steps.csv").write_text(whole + "1,0,0.3")
    (found,) = read_rows(tmp_path / "steps.csv", StepRow)
    assert (found.loss, found.lr) == (1 / 3, 1e-5)
    assert read_rows(tmp_path / "nowhere.csv", EpochRow) == []


@pytest.mark.slow
def test_tensorboard_has_the_rows_and_those_of_a_resumed_run_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--output", str(tmp_path), "--experiment", "a", "--tensorboard", "--epochs", "1"]
    flags += ["--schedule", "constant:rate=0.5", "--no-plot"]
    assert main([*TINY, *flags, "--max-steps", "2"]) == 0
    assert main(["train", "--resume", str(tmp_path / "a"), "--max-steps", "4"]) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    losses = events.Scalars("step/loss")
    written = rows(tmp_path / "a" / "steps.csv")
    assert [event.step for event in losses] == [0, 1, 2, 3]
    assert [event.value for event in losses] == pytest.approx(
        [float(row["loss"]) for row in written]
    )
    assert events.Scalars("step/drop_rate")[-1].value == 0.5
    (summary,) = rows(tmp_path / "a" / "summary.csv")
    evaluated = events.Scalars("epoch/eval_top1")[-1]
    assert (evaluated.step, evaluated.value) == (4, pytest.approx(float(summary["eval_top1"])))
    # A value that is not measured has no points.
    assert not [tag for tag in events.Tags()["scalars"] if "joules" in tag]


def test_tensorboard_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*TINY, "--tensorboard", "--output", str(tmp_path)]) == 2
    assert "pip install ssprop-fx[tensorboard]" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
