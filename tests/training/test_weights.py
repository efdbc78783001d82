"""Runs start from the weights in a file."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from training_runs import STEPS_PER_EPOCH, TINY, content, is_equal

from ssprop_fx.cli.app import main
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.setup import create_model

FLAGS = ("initial_checkpoint", "pretrained_path")


def _save(path, model="test_resnet", num_classes=7, **settings):
    torch.manual_seed(1)
    state = timm.create_model(model, num_classes=num_classes, **settings).state_dict()
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return state


def _create(num_classes=7, image_size=32, **settings):
    torch.manual_seed(2)
    config = TrainConfig(**{"model": "test_resnet", "batch_size": 2, **settings})
    return create_model(config, num_classes, image_size).state_dict()


def _without_head(state):
    return {name: value for name, value in state.items() if not name.startswith(("fc", "head"))}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_all_weights_come_from_the_file(tmp_path, flag, suffix):
    path = tmp_path / f"weights{suffix}"
    state = _save(path)
    assert is_equal(_create(**{flag: str(path)}), state)
    assert not is_equal(_create(), state)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_convnext"])
def test_other_classes_get_a_new_head(tmp_path, flag, model):
    state = _save(tmp_path / "weights.pth", model)
    size = 160 if model == "test_vit" else 32
    found = _create(3, size, model=model, **{flag: str(tmp_path / "weights.pth")})
    assert is_equal(_without_head(found), _without_head(state))
    heads = [value for name, value in found.items() if name.startswith(("fc", "head"))]
    assert [len(value) for value in heads if value.shape[0] in (3, 7)] == [3, 3]


@pytest.mark.parametrize("flag", FLAGS)
def test_a_file_without_a_head_gets_one(tmp_path, flag):
    state = _save(tmp_path / "weights.pth", num_classes=0)
    found = _create(3, **{flag: str(tmp_path / "weights.pth")})
    assert is_equal(_without_head(found), state)
    assert found["fc.weight"].shape[0] == 3


def test_a_vit_for_other_images_is_converted(tmp_path):
    state = _save(tmp_path / "weights.pth", "test_vit", img_size=64)
    path = str(tmp_path / "weights.pth")
    found = _create(3, 32, model="test_vit", pretrained_path=path)
    assert found["pos_embed"].shape != state["pos_embed"].shape
    assert torch.equal(found["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    message = "1 of another shape .pos_embed .*--pretrained-path converts"
    with pytest.raises(CommandError, match=message):
        _create(3, 32, model="test_vit", initial_checkpoint=path)


@pytest.mark.parametrize("flag", FLAGS)
def test_weights_that_do_not_fit_are_one_line(tmp_path, flag):
    name = f"--{flag.replace('_', '-')}"
    path = tmp_path / "weights.pth"

    def error(**settings):
        with pytest.raises(CommandError) as caught:
            _create(**{flag: str(path), **settings})
        text = str(caught.value)
        assert text.startswith(f"{name} {path}: ")
        assert "\n" not in text
        assert len(text) < 700
        return text

    assert "no such file" in error()
    path.write_text("<html>404</html>")
    assert "not a file of weights (.safetensors, .pth, .pt), or a damaged one" in error()
    torch.save({"epoch": 3}, path)
    assert "holds no weights, but epoch" in error()
    state = _save(path)
    assert "does not fit" in error(model="test_vit", image_size=160)
    state["layer4.0.conv1.weight"] = state.pop("layer4.0.conv1.weight")[:, :1]
    torch.save(state, path)
    assert "layer4.0.conv1.weight" in error()
    del state["layer4.0.conv1.weight"]
    torch.save(state, path)
    assert "layer4.0.conv1.weight" in error()
    torch.save({**_save(path), "more": torch.zeros(1)}, path)
    assert "more" in error()


def test_two_files_are_refused(tmp_path):
    _save(tmp_path / "a.pth")
    with pytest.raises(CommandError, match="--pretrained-path: --initial-checkpoint names"):
        _create(**dict.fromkeys(FLAGS, str(tmp_path / "a.pth")))


def test_a_run_starts_from_the_weights_of_another_and_resumes_without_the_file(whole_run, tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes((whole_run / "best.pt").read_bytes())
    flags = ["--output", str(tmp_path), "--experiment", "a", "--schedule", "none", "--epochs", "1"]
    flags += ["--initial-checkpoint", str(path), "--lr", "1e-9", "--no-plot", "--max-steps", "1"]
    assert main([*TINY, *flags]) == 0
    before, after = (content(file)["state_dict"] for file in (path, tmp_path / "a" / "last.pt"))
    assert torch.allclose(before["layer4.0.conv1.weight"], after["layer4.0.conv1.weight"])
    path.unlink()
    assert main(["train", "--resume", str(tmp_path / "a"), "--max-steps", "2"]) == 0
    assert content(tmp_path / "a" / "last.pt")["step"] == 2 < STEPS_PER_EPOCH
