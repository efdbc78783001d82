import copy
import os
import stat

import pytest
import torch
from torch import nn

from ssprop_fx.training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.files import replace_file
from ssprop_fx.training.setup import create_state


def _state(config):
    torch.manual_seed(0)
    return create_state(config, nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout()), 5)


def _step(state):
    state.model(torch.ones(2, 3, 4, 4)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step += 1
    state.scheduler.step()
    state.lr_scheduler.step_update(state.step)


def _equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left == right


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, opt):
    config = TrainConfig(opt=opt, amp=True, amp_dtype="float16", device="cpu")
    state = _state(config)
    for _ in range(7):
        _step(state)
    state.epoch, state.seconds, state.best_top1, state.best_epoch = 1, 2.5, 70.0, 0
    save_checkpoint(tmp_path / "last.pt", state, config)
    for _ in range(3):
        _step(state)

    content = load_checkpoint(tmp_path / "last.pt")
    resumed = _state(config)
    torch.manual_seed(99)
    restore(resumed, content)
    assert (resumed.epoch, resumed.step, resumed.seconds) == (1, 7, 2.5)
    assert (resumed.best_top1, resumed.best_epoch) == (70.0, 0)
    for _ in range(3):
        _step(resumed)
    assert _equal(resumed.model.state_dict(), state.model.state_dict())
    assert _equal(resumed.optimizer.state_dict(), state.optimizer.state_dict())
    assert resumed.scheduler.state_dict() == state.scheduler.state_dict() == {"last_step": 10}
    assert resumed.scheduler.drop_rate == state.scheduler.drop_rate == 0.0
    assert TrainConfig.resumed(content["config"], {}) == config


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    replace_file(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_file_has_the_permissions_of_an_ordinary_one(tmp_path):
    replace_file(tmp_path / "a", lambda file: file.write(b""))
    (tmp_path / "b").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes[0] == modes[1]


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    torch.save({"format": 4, "state_dict": Code(tmp_path / "ran")}, tmp_path / "last.pt")
    with pytest.raises(CommandError, match="not a checkpoint, or a damaged one"):
        load_checkpoint(tmp_path / "last.pt")
    assert os.listdir(tmp_path) == ["last.pt"]
    torch.load(tmp_path / "last.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir(), "it would run"


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CommandError, match="no such file"):
        load_checkpoint(tmp_path / "last.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(CommandError, match="not a checkpoint, or a damaged one"):
        load_checkpoint(tmp_path / "text.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CommandError, match="not a checkpoint of ssprop-fx train"):
        load_checkpoint(tmp_path / "other.pt")
    config = TrainConfig()
    save_checkpoint(tmp_path / "whole.pt", _state(config), config)
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CommandError, match="damaged"):
        load_checkpoint(tmp_path / "cut.pt")


def test_resume_finds_the_checkpoint_that_is_meant(tmp_path):
    for number, name in enumerate(("old", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").write_bytes(b"")
        os.utime(tmp_path / name / "last.pt", (number, number))
    (tmp_path / "empty").mkdir()
    output = str(tmp_path)
    assert find_checkpoint("", output, None) == tmp_path / "new" / "last.pt"
    assert find_checkpoint("", output, "old") == tmp_path / "old" / "last.pt"
    assert find_checkpoint(f"{output}/old", output, None) == tmp_path / "old" / "last.pt"
    assert find_checkpoint("some/best.pt", output, None).name == "best.pt"
    with pytest.raises(CommandError, match=r"no run in .*empty has a last\.pt"):
        find_checkpoint("", f"{output}/empty", None)


def test_a_resumed_run_keeps_what_decides_its_result():
    saved = TrainConfig(lr=0.2, workers=2).to_dict()
    config = TrainConfig.resumed(copy.deepcopy(saved), {"workers": 4, "lr": 0.2})
    assert (config.lr, config.workers) == (0.2, 4)
    with pytest.raises(CommandError, match=r"--lr cannot change on --resume: .* 0\.2, got 0\.3"):
        TrainConfig.resumed(saved, {"lr": 0.3})
    with pytest.raises(CommandError, match="--min-channels cannot change on --resume"):
        TrainConfig.resumed(saved, {"min_channels": 8})
    assert TrainConfig.resumed(saved, {"min_channels": 32, "rates": {}}) == TrainConfig(
        lr=0.2, workers=2
    )
    # Runs from before --aug-kwargs have its keys next to the others.
    before = {"rates": None, "channel_multiple": None, "vflip": 0.5, "remode": "pixel"}
    before = {name: v for name, v in saved.items() if name != "aug_kwargs"} | before
    resumed = TrainConfig.resumed(before, {"aug_kwargs": {"vflip": 0.5}})
    assert resumed == TrainConfig(lr=0.2, workers=2, aug_kwargs={"vflip": 0.5})
    with pytest.raises(CommandError, match="another version: it has future"):
        TrainConfig.resumed({**saved, "future": 1}, {})
