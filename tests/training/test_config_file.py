"""Settings mean the same in YAML and on the command line."""

import argparse
from dataclasses import fields

import pytest
from training_runs import TINY, assert_same_run

from ssprop_fx import SparsityConfig
from ssprop_fx.cli.app import main, train
from ssprop_fx.options import options_of
from ssprop_fx.training import run as run_module
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.config_file import read_arguments, write_config

NAMES = {name for name, option in options_of(TrainConfig).items() if option.has_text}


def train_parser():
    subparsers = argparse.ArgumentParser().add_subparsers()
    train.add_parser(subparsers)
    return subparsers.choices["train"]


@pytest.fixture
def parse(monkeypatch):
    """Returns the settings that a command line gives, without a run."""
    seen = []
    monkeypatch.setattr(run_module, "train", lambda config, **kwargs: seen.append(config) or 0)

    def parse(*arguments):
        assert main(["train", *map(str, arguments)]) == 0
        return seen[-1]

    return parse


def test_every_setting_has_a_flag_and_every_flag_a_setting():
    parser = train_parser()
    of_the_command = {"config", "resume", "changed_data", "help"}
    assert {action.dest for action in parser._actions} - of_the_command == NAMES
    # Nothing on the command line leaves TrainConfig its defaults.
    assert set(vars(parser.parse_args([]))) == {"run"}
    settings = {field.name for field in fields(TrainConfig)} - {"sparsity"}
    sparsity = {field.name for field in fields(SparsityConfig)} - {"filter_fn"}
    assert not settings & sparsity
    assert settings | sparsity == NAMES


def test_the_help_is_short_and_each_line_a_sentence():
    actions = train_parser()._actions
    assert len(actions) <= 80
    for action in actions[1:]:
        assert action.help[0].isupper(), action.help
        assert not action.help.endswith("."), action.help


def test_a_file_gives_settings_and_the_command_line_wins(parse, tmp_path):
    path = tmp_path / "my settings é.yaml"
    path.write_text(
        "# comment\n"
        "model: resnet26\n"
        "batch-size: 32\n"
        "lr: 1e-3\n"  # a string in YAML 1.1
        "amp: true\n"
        "plot: false\n"
        "experiment: -Größe\n"
        "drop_path: null\n"
        "cutmix_minmax: [0.2, 0.8]\n"
        "targets: [conv, depthwise]\n"
        "opt_kwargs: {betas: [0.8, 0.9], eps: 1.0e-6, name: adam}\n",
        encoding="utf-8",
    )
    expected = TrainConfig(
        model="resnet26",
        batch_size=32,
        lr=0.5,
        amp=True,
        plot=False,
        experiment="-Größe",
        aug_kwargs={"cutmix_minmax": (0.2, 0.8)},
        sparsity=SparsityConfig(targets=("conv", "depthwise")),
        opt_kwargs={"betas": [0.8, 0.9], "eps": 1e-6, "name": "adam"},
    )
    assert parse("--config", path, "--lr", "0.5") == expected
    assert parse("--lr", "0.5", "--config", path) == expected


def test_pairs_on_the_command_line_are_python_literals_or_texts(parse):
    config = parse("--opt-kwargs", "betas=(0.8, 0.9)", "nesterov=False", "mode=fast=er")
    assert config.opt_kwargs == {"betas": (0.8, 0.9), "nesterov": False, "mode": "fast=er"}


def test_what_a_run_keeps_of_its_settings_gives_the_same_settings(parse, tmp_path):
    config = TrainConfig(
        lr=1e-4,
        aug=False,
        mean=(0.5,),
        model_kwargs={"drop_rate": 0.1},
        experiment="x",
        aug_kwargs={"scale": (0.5, 1.0), "hflip": 0.0},
        sparsity=SparsityConfig(
            **{"channel_multiple": 4, "specialize": False, "rates": {"layer4.*": 0.9}},
            **{"gate": False, "memory": 0.5, "targets": ("conv",)},
        ),
    )
    write_config(tmp_path / "config.yaml", config)
    assert parse("--config", tmp_path / "config.yaml", "--experiment", "x") == config


def test_a_run_can_be_repeated_from_its_config(tmp_path):
    flags = ["--epochs", "1", "--max-steps", "2", "--schedule", "constant:rate=0.5"]
    assert main([*TINY, *flags, "--output", str(tmp_path), "--experiment", "a"]) == 0
    again = ["train", "--config", str(tmp_path / "a" / "config.yaml"), "--output", str(tmp_path)]
    assert main([*again, "--experiment", "b"]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "unknown key 'batchsize'; did you mean batch_size?"),
        ("zzz: 3", "unknown key 'zzz'"),
        ("resume: a", "unknown key 'resume'"),
        ("filter_fn: a", "unknown key 'filter_fn'"),
        ("aug_kwargs: 3", "right would be KEY=VALUE, got '3'"),
        ("specialize: 3", "--specialize: must be auto, yes or no, got '3'"),
        ("3: 4", "unknown key 3"),
        ("lr: fast", "argument --lr: invalid float value: 'fast'"),
        ("lr: -1", "--lr must be above 0, got -1.0"),
        ("lr: true", "expected one argument"),
        ("- lr", "right would be lines such as `batch_size: 64`"),
        ("lr: [", "not a YAML file"),
        ("lr: !!python/object/apply:os.getcwd []", "not a YAML file"),
        ("sched: cosin", "invalid choice: 'cosin'"),
        ("opt_kwargs: 3", "right would be KEY=VALUE, got '3'"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--config", "c.yaml"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_file_that_is_missing_is_named(capsys):
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert "--config nowhere.yaml: No such file" in capsys.readouterr().err


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("")
    assert read_arguments(str(tmp_path / "c.yaml")) == []
