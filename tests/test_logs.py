"""SSPROP_LOG: what a user sees of the compiler and its passes."""

import os
import subprocess
import sys

PROGRAM = """
import torch
from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 4))
config = SparsityConfig(gate=False)
model = ssprop_compile(model, SparsityScheduler(constant(0.5)), config=config, backend="aot_eager")
model(torch.randn(4, 8)).sum().backward()
"""


def run(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return done.stderr


def test_info_shows_every_pass_and_graph() -> None:
    lines = run(SSPROP_LOG="info").splitlines()
    assert any(
        "SparseBackwardPass: 2 matched, 1 rewritten, 1 left dense"
        " (fewer than min_channels=32 output channels: 1), " in line
        for line in lines
    )
    assert "ssprop_fx.compiler.backend: graph compiled: 1 sites sparse, 1 dense" in lines


def test_nothing_is_shown_by_default() -> None:
    assert "matched" not in run()


def test_an_unknown_level_is_one_clear_line() -> None:
    *_, last = run(SSPROP_LOG="loud").splitlines()
    assert last == "ValueError: SSPROP_LOG must be one of debug, info, warning, error, got 'loud'"
