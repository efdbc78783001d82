"""The benchmark of global max pooling."""

from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import COMMANDS
from benchmarks.pooling import MODELS, MalConv, TextCnn, measure, run


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"malconv": lambda: MalConv(4, 20), "textcnn": lambda: TextCnn(4, (3, 5))}
    monkeypatch.setitem(MODELS, name, small[name])
    row = measure(name, 800, 2, rounds=2)
    assert 0 < row.error < 1e-5
    assert row.dense_ms > 0
    assert (row.model, row.length) == (f"{name} b2", 800)


def test_the_command_is_known() -> None:
    assert any(command.__name__ == run.__module__ for command in COMMANDS)
    assert MalConv(4, 20)(torch.ones(2, 100, dtype=torch.int64)).shape == (2, 2)
    assert Path(run.__code__.co_filename).name == "pooling.py"
