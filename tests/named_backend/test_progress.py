"""What the log of a script that was not edited says about its sparse steps."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from no_edit import compiled, loss, variant
from torch import nn

from ssprop_fx import report
from ssprop_fx.logs import show_by_default
from ssprop_fx.named_backend import progress
from ssprop_fx.named_backend.plugin import ssprop

SCRIPT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
    def forward(self, x):
        return self.two(self.one(x).tanh())

model = Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
compiled = torch.compile(model, backend="ssprop")
for _ in range(8):
    compiled(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
"""
LINES = [
    "Net: steps 0 to 1: dense; from step 2: drop rate 0.75",
    "Net: steps 2 to 3: 2 of 2 sparse, mean drop rate 0.75, {0} of the backward's FLOPs saved;"
    " from step 4: dense",
    "Net: steps 4 to 5: dense; from step 6: drop rate 0.75",
    "Net: steps 6 to 7: 2 of 2 sparse, mean drop rate 0.75, {0} of the backward's FLOPs saved;"
    " from step 8: dense",
    "Net: all steps: 4 of 8 sparse, mean drop rate 0.375, {1} of the backward's FLOPs saved",
]


def run(script: str = SCRIPT, **environment: str) -> list[str]:
    settings = {"SSPROP_SCHEDULE": "bar:rate=0.75,period=4", "SSPROP_BACKEND": "aot_eager"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_phases_and_the_end_are_shown_by_default() -> None:
    lines = [line.format("75.0%", "37.5%") for line in LINES]
    assert run() == [f"ssprop: {line}" for line in lines]


def test_a_programs_own_log_gets_them_once() -> None:
    own = "import logging\nlogging.basicConfig(format='own %(message)s')\n"
    lines = [line.format("75.0%", "37.5%") for line in LINES]
    assert run(own + SCRIPT) == [f"own {line}" for line in lines]


def test_the_environment_silences_them() -> None:
    assert run(SSPROP_LOG="warning") == []


def test_the_program_decides_about_a_logger_that_it_has_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = logging.getLogger("ssprop_fx.example")
    monkeypatch.setattr(logging.getLogger("ssprop_fx"), "level", logging.ERROR)
    show_by_default(ours)
    assert not ours.handlers
    monkeypatch.setattr(logging.getLogger("ssprop_fx"), "level", logging.NOTSET)
    show_by_default(ours)
    assert ours.isEnabledFor(logging.INFO)


def test_one_rank_of_several_speaks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    model = nn.Linear(8, 8)
    call = compiled(model, "constant:rate=0.5")
    loss(call(torch.randn(4, 8))).backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    with caplog.at_level(logging.INFO, "ssprop_fx"):
        variant(model).progress.end()
    assert not [r for r in caplog.records if "steps" in r.getMessage()]


def test_a_schedule_that_alternates_does_not_fill_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Linear(8, 8)
    call = compiled(model, "bar:rate=0.5,period=2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with caplog.at_level(logging.INFO, "ssprop_fx"):
        for _ in range(20):
            loss(call(torch.randn(4, 8))).backward()
            optimizer.step()
    assert len([r for r in caplog.records if "; from step" in r.getMessage()]) == 4


def test_what_is_saved_is_what_the_report_says(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3))
    call = compiled(model, "constant:rate=0.5", min_channels=7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss(call(torch.randn(2, 3, 9, 9))).backward()
    seen = report(model)
    optimizer.step()
    with caplog.at_level(logging.INFO, "ssprop_fx"):
        variant(model).progress.end()
        variant(model).progress.end()
    (line,) = [r.getMessage() for r in caplog.records if "all steps" in r.getMessage()]
    share = seen.saved_flops / seen.backward_flops
    assert 0.1 < share < 0.45
    assert line == (
        "Sequential: all steps: 1 of 1 sparse, mean drop rate 0.5,"
        f" {share:.1%} of the backward's FLOPs saved"
    )


def test_without_a_schedule_the_rate_is_what_the_rule_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    call = torch.compile(model, backend=ssprop, options={"backend": "aot_eager"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    left_out = []
    for _ in range(2):
        scale = torch.logspace(-2, 2, 12)[:, None]
        loss(call(torch.randn(12, 8)) * scale).backward()
        optimizer.step()
        kept, size = variant(model).kept_samples
        left_out.append(1 - kept / size)
    assert min(left_out) > 0
    with caplog.at_level(logging.INFO, "ssprop_fx"):
        variant(model).progress.end()
    (line,) = [r.getMessage() for r in caplog.records if "all steps" in r.getMessage()]
    mean = sum(left_out) / 2
    assert line == (
        f"Sequential: all steps: 2 of 2 sparse, mean drop rate {mean:.3g},"
        f" {mean:.1%} of the backward's FLOPs saved"
    )


def test_a_rule_that_keeps_all_samples_is_not_called_dense() -> None:
    steps = progress._Steps()
    assert str(steps) == "dense"
    steps.count = steps.sparse = 2
    assert str(steps) == ("2 of 2 sparse, mean drop rate 0, 0.0% of the backward's FLOPs saved")
