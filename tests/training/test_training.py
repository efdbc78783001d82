"""Effects of a run's settings on its weights."""

import pytest
import timm
import torch
from timm.models import load_checkpoint
from torch import nn
from training_runs import TINY, content, rows

from ssprop_fx.cli.app import main
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.setup import create_state, sparsity_config

# Without batch normalisation, a batch's gradient is the mean of its parts' gradients.
NO_BATCH_NORM = [*TINY, "--model", "test_vit", "--epochs", "1", "--max-steps", "3", "--no-plot"]


def _train(folder, name, *flags):
    assert main([*flags, "--output", str(folder), "--experiment", name]) == 0
    return content(folder / name / "last.pt"), rows(folder / name / "steps.csv")


def test_accumulated_batches_make_one_step(tmp_path):
    flags = [*NO_BATCH_NORM, "--schedule", "none"]
    whole, whole_steps = _train(tmp_path, "whole", *flags)
    parts, parts_steps = _train(tmp_path, "parts", *flags, "-b", "32", "--grad-accum-steps", "4")
    assert parts["step"] == whole["step"] == 3
    assert parts["sparsity_scheduler"] == whole["sparsity_scheduler"]
    for left, right in zip(whole_steps, parts_steps, strict=True):
        assert float(left["loss"]) == pytest.approx(float(right["loss"]), rel=1e-4)
    for name, weight in whole["state_dict"].items():
        torch.testing.assert_close(parts["state_dict"][name], weight, rtol=1e-3, atol=1e-5)


def test_samples_by_a_rule_with_frozen_batch_norms(tmp_path, capsys):
    flags = [*TINY, "--epochs", "1", "--max-steps", "4", "--recipe", "samples", "--no-plot"]
    flags += ["--freeze-batch-norm", "--smoothing", "0"]
    saved, steps = _train(tmp_path, "a", *flags)
    assert saved["state_dict"]["conv1.1.num_batches_tracked"] == 0
    assert saved["config"]["controller"] == "added_noise:target=0.1"
    for row in steps:
        assert 0 < float(row["drop_rate"]) < 1
        assert float(row["backward_saved"]) == pytest.approx(float(row["drop_rate"]), abs=0.02)
        assert 0.3 < float(row["kept_mass"]) < 1
        assert 0 < float(row["added_noise"]) < 1
    assert "samples kept: " in capsys.readouterr().out


def test_the_moving_average_is_what_is_validated_and_what_timm_reads(tmp_path):
    flags = [*TINY, "--epochs", "1", "--max-steps", "6", "--schedule", "none", "--model-ema"]
    saved, _ = _train(tmp_path, "a", *flags, "--model-ema-decay", "0.9")
    assert not torch.equal(saved["state_dict"]["fc.weight"], saved["state_dict_ema"]["fc.weight"])
    model = timm.create_model("test_resnet", num_classes=10)
    load_checkpoint(model, str(tmp_path / "a" / "last.pt"))
    assert torch.equal(model.fc.weight, saved["state_dict_ema"]["fc.weight"])
    (with_average,) = rows(tmp_path / "a" / "summary.csv")
    # With a decay of 0, the average equals the weights.
    saved, _ = _train(tmp_path, "b", *flags, "--model-ema-decay", "0")
    assert torch.equal(saved["state_dict"]["fc.weight"], saved["state_dict_ema"]["fc.weight"])
    _train(tmp_path, "c", *[flag for flag in flags if flag != "--model-ema"])
    (of_weights,) = rows(tmp_path / "b" / "summary.csv")
    (without,) = rows(tmp_path / "c" / "summary.csv")
    assert of_weights["eval_loss"] == without["eval_loss"]
    assert of_weights["eval_loss"] != with_average["eval_loss"]


@pytest.mark.parametrize(
    "mode",
    ["norm", *[pytest.param(mode, marks=pytest.mark.slow) for mode in ("value", "agc")]],
)
def test_clipped_gradients_move_weights_less(tmp_path, mode):
    flags = [*TINY, "--epochs", "1", "--max-steps", "1", "--schedule", "none", "--weight-decay"]
    free, _ = _train(tmp_path, "free", *flags, "0")
    clipped, _ = _train(tmp_path, mode, *flags, "0", "--clip-grad", "1e-4", "--clip-mode", mode)
    momentum = [
        torch.cat(
            [slot["momentum_buffer"].flatten() for slot in run["optimizer"]["state"].values()]
        )
        for run in (free, clipped)
    ]
    assert 0 < momentum[1].norm() < 0.1 * momentum[0].norm()


def test_targets_say_which_layers_take_part(tmp_path):
    flags = [*NO_BATCH_NORM, "--schedule", "constant:rate=0.5", "--targets"]
    _train(tmp_path, "a", *flags, "linear", "--max-steps", "1")
    lines = (tmp_path / "a" / "sites.txt").read_text().splitlines()
    kinds = ("linear", "conv2d")
    states = {kind: [line.split()[5] for line in lines if f" {kind} " in line] for kind in kinds}
    assert set(states["conv2d"]) == {"dense:"}
    assert states["linear"].count("sparse") > 3
    config = TrainConfig.from_settings({"targets": ("depthwise",)})
    assert sparsity_config(config).targets == ("depthwise",)


@pytest.mark.slow
def test_how_channels_are_chosen_reaches_the_model(tmp_path):
    flags = [*NO_BATCH_NORM, "--schedule", "constant:rate=0.5", "--max-steps", "1"]
    runs = {"topk": [], "random": ["--select", "random"], "weight": ["--gradients", "weight"]}
    weights = {name: _train(tmp_path, name, *flags, *more)[0] for name, more in runs.items()}
    first = {name: next(iter(run["state_dict"].values())) for name, run in weights.items()}
    assert not torch.equal(first["topk"], first["random"])
    assert not torch.equal(first["topk"], first["weight"])


def test_how_channels_are_chosen_reaches_the_configuration():
    flags = {"select": "sampled", "score": "l2", "gradients": "input", "block": 2, "gate": False}
    assert sparsity_config(TrainConfig.from_settings({"axis": "sample"})).axis == "sample"
    made = sparsity_config(TrainConfig.from_settings(flags))
    chosen = (made.select, made.score, made.gradients, made.block, made.gate)
    assert chosen == ("sampled", "l2", "input", 2, False)


def _learning_rates(steps=40, **settings):
    config = TrainConfig(epochs=4, lr=1.0, **settings)
    state = create_state(config, nn.Linear(2, 2), steps_per_epoch=10)
    rates = []
    for step in range(steps):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.lr_scheduler.step_update(step + 1)
    return rates


def test_learning_rate_schedules_are_those_of_timm():
    rates = _learning_rates(sched="multistep", sched_kwargs={"decay_milestones": [1, 3]})
    assert [rates[step] for step in (0, 20, 35)] == pytest.approx([1.0, 0.1, 0.01])
    further = {"decay_epochs": 2, "warmup_lr": 0.5}
    rates = _learning_rates(sched="step", warmup_epochs=1, sched_kwargs=further)
    assert rates[:3] == pytest.approx([0.5, 0.55, 0.6])
    assert rates[-1] == pytest.approx(0.1)
    rates = _learning_rates(sched="wsd", sched_kwargs={"min_lr": 0.0})
    assert rates[:30] == pytest.approx([1.0] * 30)
    assert rates[-1] < 0.3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--opt-kwargs", "speed=3"], "--opt sgd: "),
        (["--sched-kwargs", "speed=3"], "--sched cosine: "),
        (["--model-kwargs", "speed=3"], "--model test_resnet does not take it: "),
        (["--opt-kwargs", "speed"], "right would be KEY=VALUE, got 'speed'"),
        (
            ["--mixup", "0.2", "-b", "127"],
            "--batch-size must be even with mixup or cutmix, got 127",
        ),
        (
            ["--aug-kwargs", "cutmix_minmax=[0.8, 0.2]"],
            "--aug-kwargs: cutmix_minmax must be two numbers in [0, 1]",
        ),
        (
            ["--aug-kwargs", "vflp=0.5"],
            "--aug-kwargs vflp: unknown; did you mean vflip? Known are train_crop_mode, train_",
        ),
        (["--aug-kwargs", "recount=0"], "--aug-kwargs: recount must be above 0, got 0"),
        (["--aug-kwargs", "remode=noise"], "remode must be one of ('const', 'rand', 'pixel')"),
        (["--specialize", "maybe"], "--specialize: must be auto, yes or no, got 'maybe'"),
        (
            ["--specialize", "yes", "--schedule", "linear:start=0,end=0.8,steps=2ep"],
            "--specialize must be auto or no here",
        ),
        (["--rates", "layer_1=2"], "--rates['layer_1'] must be in [0, 1), got 2"),
        (
            ["--controller", "added_error:target=0.1", "--axis", "sample"],
            "--axis must be channel with --controller added_error:target=0.1",
        ),
        (["--model-ema-decay", "1"], "--model-ema-decay must be in [0, 1), got 1.0"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be above 0, got 0"),
        (["--targets", "conv", "pool"], "invalid choice: 'pool'"),
    ],
)
def test_a_wrong_setting_is_one_line(flags, message, tmp_path, capsys):
    assert main([*TINY, *flags, "--output", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
