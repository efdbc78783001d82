"""SparsityConfig's checks."""

import dataclasses

import pytest

from ssprop_fx import SparsityConfig


def test_defaults():
    config = SparsityConfig()
    assert config.channel_multiple == "auto"
    assert config.min_channels == 32
    assert config.filter_fn is None
    assert config.targets == ("conv", "linear")


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
    ],
)
def test_names_the_argument_that_is_wrong(arguments, error, message):
    with pytest.raises(error) as caught:
        SparsityConfig(**arguments)
    assert str(caught.value).startswith(message)


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
