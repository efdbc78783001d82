"""Settings of the no-edit backend: options, environment variables and their errors."""

import pytest
from torch import nn

from ssprop_fx import AddedError, KeptMass, SparsityConfig, bar, constant, default_rule
from ssprop_fx.named_backend.options import Settings, read_settings

BAR = "bar:rate=0.8,period=2000"


def keep_all(module: nn.Module, name: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("mode", "options", "environ", "expected"),
    [
        (None, None, {"SSPROP_SCHEDULE": BAR, "PATH": "x"}, Settings(bar(0.8, 2000))),
        (None, {"schedule": BAR}, {}, Settings(bar(0.8, 2000))),
        (None, {"schedule": bar(0.8, 20)}, {"SSPROP_SCHEDULE": BAR}, Settings(bar(0.8, 20))),
        (
            None,
            {"min_channels": 8, "filter_fn": keep_all, "start_step": 5},
            {
                "SSPROP_SCHEDULE": " none ",
                "SSPROP_TARGETS": "conv, depthwise",
                "SSPROP_MIN_CHANNELS": "64",
                "SSPROP_CHANNEL_MULTIPLE": "auto",
                "SSPROP_BACKEND": "aot_eager",
            },
            Settings(
                constant(0.0),
                5,
                SparsityConfig(targets=("conv", "depthwise"), min_channels=8, filter_fn=keep_all),
                "aot_eager",
            ),
        ),
        (
            None,
            {"max-autotune": True, "channel_multiple": "4"},
            {"SSPROP_SCHEDULE": "none", "SSPROP_START_STEP": "12"},
            Settings(
                constant(0.0),
                12,
                SparsityConfig(channel_multiple=4),
                inductor={"max_autotune": True},
            ),
        ),
        (
            None,
            {"gate": "no", "rates": {"stem.*": 0.5}},
            {
                "SSPROP_SCHEDULE": "none",
                "SSPROP_LOG": "info",
                "SSPROP_MEMORY": "0.9",
                "SSPROP_RATES": "layer4.*=0.9",
                "SSPROP_SELECT": "random",
                "SSPROP_SCORE": "l2_weight",
                "SSPROP_SPECIALIZE": "false",
                "SSPROP_TELEMETRY": "1",
            },
            Settings(
                constant(0.0),
                config=SparsityConfig(
                    memory=0.9,
                    rates={"stem.*": 0.5},
                    select="random",
                    score="l2_weight",
                    specialize=False,
                    gate=False,
                    telemetry=True,
                ),
            ),
        ),
        (
            None,
            None,
            {"SSPROP_SCHEDULE": "none", "SSPROP_RATES": "layer4.*=0.9, stem.*=0"},
            Settings(constant(0.0), config=SparsityConfig(rates={"layer4.*": 0.9, "stem.*": 0})),
        ),
        (
            None,
            {},
            {},
            Settings(None, controller=default_rule(), config=SparsityConfig(axis="sample")),
        ),
        (
            None,
            {"controller": KeptMass(0.9)},
            {"SSPROP_AXIS": "sample", "SSPROP_SCHEDULE": "none"},
            Settings(constant(0.0), controller=KeptMass(0.9), config=SparsityConfig(axis="sample")),
        ),
        (
            None,
            {"schedule": "none"},
            {"SSPROP_CONTROLLER": "added_error:target=0.1"},
            Settings(constant(0.0), controller=AddedError(0.1)),
        ),
        (
            "max-autotune-no-cudagraphs",
            {"schedule": "none"},
            {},
            Settings(
                constant(0.0), inductor={"max_autotune": True, "coordinate_descent_tuning": True}
            ),
        ),
    ],
)
def test_settings(
    mode: str | None, options: dict | None, environ: dict, expected: Settings
) -> None:
    assert read_settings(mode, options, environ) == expected


@pytest.mark.parametrize(
    ("mode", "options", "environ", "error", "message"),
    [
        (
            None,
            {"axis": "channel"},
            {},
            ValueError,
            "needs a schedule for channels, such as SSPROP_SCHEDULE=bar:",
        ),
        (
            None,
            None,
            {"SSPROP_CONTROLLER": "kept_mass"},
            ValueError,
            "SSPROP_CONTROLLER: kept_mass: kept_mass needs target=; right would be kept_mass:tar",
        ),
        (None, {"controller": 0.9}, {}, TypeError, "options['controller']: must be a controller"),
        (None, None, {"SSPROP_SCHEDULE": " "}, ValueError, "SSPROP_SCHEDULE: must not be empty: "),
        (
            None,
            None,
            {"SSPROP_SCHEDULE": "bar:rate=80,period=2"},
            ValueError,
            "SSPROP_SCHEDULE: bar:rate=80,period=2: rate must be in [0, 1), got 80.0",
        ),
        (
            None,
            {"schedule": "bar:rate=0.8,period=2ep"},
            {},
            ValueError,
            "options['schedule']: bar:rate=0.8,period=2ep: period=2ep is in epochs",
        ),
        (None, {"schedule": 0.8}, {}, TypeError, "options['schedule']: must be a schedule or"),
        (
            None,
            None,
            {"SSPROP_SHEDULE": BAR},
            ValueError,
            "SSPROP_SHEDULE in the environment is unknown: did you mean SSPROP_SCHEDULE?",
        ),
        (
            None,
            None,
            {"SSPROP_FILTER_FN": "x"},
            ValueError,
            "SSPROP_FILTER_FN in the environment is unknown: filter_fn is a function, so",
        ),
        (
            None,
            None,
            {"SSPROP_SCHEDULE": BAR, "SSPROP_MEMORY": "1.5"},
            ValueError,
            "SSPROP_MEMORY: memory must be in [0, 1), got 1.5",
        ),
        (
            None,
            None,
            {"SSPROP_SCHEDULE": BAR, "SSPROP_GATE": "perhaps"},
            ValueError,
            "SSPROP_GATE: gate must be yes or no, got 'perhaps'",
        ),
        (
            None,
            None,
            {"SSPROP_SCHEDULE": BAR, "SSPROP_RATES": "layer4"},
            TypeError,
            "SSPROP_RATES: rates must be a text such as layer4.*=0.9, got 'layer4'",
        ),
        (
            None,
            {"schedule": BAR, "specialize": True},
            {},
            ValueError,
            "options['specialize']: specialize must be \"auto\" or False with this backend",
        ),
        (
            None,
            {"schedule": BAR, "min_chanels": 3},
            {},
            ValueError,
            "options['min_chanels'] is neither ssprop's nor Inductor's: did you mean min_channels?",
        ),
        (
            None,
            None,
            {"SSPROP_SCHEDULE": BAR, "SSPROP_MIN_CHANNELS": "few"},
            ValueError,
            "SSPROP_MIN_CHANNELS: min_channels must be a whole number, got 'few'",
        ),
        (
            None,
            None,
            {"SSPROP_SCHEDULE": BAR, "SSPROP_TARGETS": "convolution"},
            ValueError,
            "SSPROP_TARGETS: targets must be of",
        ),
        (
            None,
            None,
            {"SSPROP_SCHEDULE": BAR, "SSPROP_START_STEP": "-1"},
            ValueError,
            "SSPROP_START_STEP: must be a number of steps, 0 or more, got '-1'",
        ),
        (
            None,
            {"schedule": BAR, "backend": "eager"},
            {},
            ValueError,
            "options['backend']: must be one of ('inductor', 'aot_eager'), got 'eager'",
        ),
        (
            "max-autotune",
            None,
            {"SSPROP_SCHEDULE": BAR, "SSPROP_BACKEND": "aot_eager"},
            ValueError,
            "do not fit the inner backend 'aot_eager'",
        ),
    ],
)
def test_wrong_settings_are_named(
    mode: str | None, options: dict | None, environ: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        read_settings(mode, options, environ)
    assert message in str(caught.value)
