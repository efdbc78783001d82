"""The benchmark of global max pooling."""

import pytest

from benchmarks.pooling import MODELS, MalConv, TextCnn, measure


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"malconv": lambda: MalConv(4, 20), "textcnn": lambda: TextCnn(4, (3, 5))}
    monkeypatch.setitem(MODELS, name, small[name])
    row = measure(name, 800, 2, rounds=2)
    assert 0 < row.error < 1e-5
    assert row.dense_ms > 0
    assert (row.model, row.length) == (f"{name} b2", 800)
