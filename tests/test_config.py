"""SparsityConfig's checks."""

import dataclasses
import pickle

import pytest
from ssprop_passes.selection.policy import GRADIENTS, Selection
from ssprop_passes.selection.scores import SCORES, l2, l2_weight
from ssprop_passes.selection.selectors import sampled, topk

from ssprop_fx import SparsityConfig
from ssprop_fx.options import options_of


def test_defaults():
    config = SparsityConfig()
    assert config.channel_multiple == "auto"
    assert config.min_channels == 32
    assert config.filter_fn is None
    assert config.targets == ("conv", "depthwise", "linear")


def test_takes_what_is_valid():
    def is_wanted(module, fqn):
        return True

    config = SparsityConfig(channel_multiple=1, min_channels=1, filter_fn=is_wanted)
    assert (config.channel_multiple, config.min_channels) == (1, 1)
    assert config.filter_fn is is_wanted


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"channel_multiple": 0}, ValueError, "channel_multiple must be at least 1, got 0"),
        ({"channel_multiple": -8}, ValueError, "channel_multiple must be at least 1, got -8"),
        ({"channel_multiple": 8.0}, TypeError, 'channel_multiple must be an int or "auto", got 8'),
        ({"channel_multiple": "16"}, TypeError, 'channel_multiple must be an int or "auto"'),
        ({"channel_multiple": True}, TypeError, 'channel_multiple must be an int or "auto"'),
        ({"channel_multiple": None}, TypeError, 'channel_multiple must be an int or "auto"'),
        ({"patch": 0}, ValueError, "patch must be at least 1, got 0"),
        ({"patch": 2}, ValueError, 'patch must be 1 with axis="channel", got 2'),
        ({"saved": "kept"}, ValueError, 'saved must be "all" with axis="channel", got \'kept\''),
        ({"min_channels": 0}, ValueError, "min_channels must be at least 1, got 0"),
        ({"min_channels": 0.5}, TypeError, "min_channels must be an int, got 0.5"),
        ({"min_channels": "auto"}, TypeError, "min_channels must be an int, got 'auto'"),
        ({"min_channels": False}, TypeError, "min_channels must be an int, got False"),
        ({"filter_fn": "stem"}, TypeError, "filter_fn must be a callable"),
        ({"filter_fn": ["stem"]}, TypeError, "filter_fn must be a callable"),
        ({"targets": "conv"}, TypeError, "targets must be a tuple"),
        ({"targets": ["conv"]}, TypeError, "targets must be a tuple"),
        ({"targets": ()}, ValueError, "targets must be"),
        ({"targets": ("conv", "rnn")}, ValueError, "targets must be"),
        ({"select": "top-k"}, ValueError, "select must be one of ('topk', 'random', 'sampled')"),
        ({"select": None}, TypeError, "select must be one of ('topk', 'random', 'sampled') or a"),
        ({"score": "l1"}, ValueError, f"score must be one of {tuple(SCORES)} or a"),
        ({"score": 2}, TypeError, f"score must be one of {tuple(SCORES)} or a"),
        ({"gradients": "bias"}, ValueError, "gradients must be one of ('both', 'weight', 'input')"),
        ({"gradients": ["both"]}, ValueError, "gradients must be one of ('both', 'weight',"),
        ({"block": 0}, ValueError, "block must be at least 1, got 0"),
        ({"block": "auto"}, TypeError, "block must be an int, got 'auto'"),
        ({"rates": 0.5}, TypeError, 'rates must be a dict such as {"layer4.*": 0.9}, got 0.5'),
        ({"rates": {0: 0.5}}, TypeError, "rates must have name patterns as keys, got 0"),
        ({"memory": "0.9"}, TypeError, "memory must be a number, got '0.9'"),
        ({"memory": True}, TypeError, "memory must be a number, got True"),
        ({"memory": 1}, ValueError, "memory must be in [0, 1), got 1"),
        ({"memory": -0.1}, ValueError, "memory must be in [0, 1), got -0.1"),
        ({"memory": float("nan")}, ValueError, "memory must be in [0, 1), got nan"),
        (
            {"memory": 0.5, "select": "sampled"},
            ValueError,
            'memory must be 0 with select="sampled"',
        ),
        ({"memory": 0.5, "select": sampled}, ValueError, 'memory must be 0 with select="sampled"'),
        ({"gate": 1}, TypeError, "gate must be True or False, got 1"),
        ({"specialize": "yes"}, TypeError, 'specialize must be True, False or "auto", got'),
        ({"ranks": "all"}, ValueError, "ranks must be one of ('own', 'shared'), got 'all'"),
        ({"axis": "row"}, ValueError, "axis must be one of ('channel', 'sample'), got 'row'"),
        ({"rates": {"*": "0"}}, TypeError, "rates['*'] must be a number, got '0'"),
        ({"rates": {"*": True}}, TypeError, "rates['*'] must be a number, got True"),
        ({"rates": {"*": 1.0}}, ValueError, "rates['*'] must be in [0, 1), got 1.0"),
        ({"rates": {"*": float("nan")}}, ValueError, "rates['*'] must be in [0, 1), got nan"),
    ],
)
def test_names_the_argument_that_is_wrong(arguments, error, message):
    with pytest.raises(error) as caught:
        SparsityConfig(**arguments)
    assert str(caught.value).startswith(message)


def test_names_and_functions_say_how_channels_are_chosen():
    def of_ones_own(*args):
        return args

    assert SparsityConfig().selection == Selection(l2, topk, "both", 1, 0.0)
    config = SparsityConfig(select="sampled", score="l2_weight", gradients="input", block=4)
    assert config.selection == Selection(l2_weight, sampled, "input", 4)
    config = SparsityConfig(select=of_ones_own, score=of_ones_own, memory=0.5)
    assert config.selection == Selection(of_ones_own, of_ones_own, memory=0.5)


def test_rates_are_a_copy_and_the_config_can_be_hashed_copied_and_pickled():
    rates = {"layer4.*": 0.9}
    config = SparsityConfig(rates=rates)
    rates["*"] = 0.5
    assert config.rates == {"layer4.*": 0.9}
    assert config != SparsityConfig()
    for copy in (pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert copy == config
        assert hash(copy) == hash(config)


def test_names_are_those_that_the_pass_knows():
    assert options_of(SparsityConfig)["gradients"].choices == tuple(GRADIENTS)
    assert options_of(SparsityConfig)["score"].choices == tuple(SCORES)


def test_takes_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        SparsityConfig(16)


def test_is_frozen_and_compares_by_value():
    config = SparsityConfig(min_channels=64)
    assert config == SparsityConfig(min_channels=64) != SparsityConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.min_channels = 32
    # A changed copy is checked as well.
    with pytest.raises(ValueError, match="min_channels"):
        dataclasses.replace(config, min_channels=0)
