"""The benchmark of global max pooling."""

import pytest

from benchmarks.pooling import MODELS, TextCnn, measure


def test_rows_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "small", lambda: TextCnn(4, (3, 5)))
    row = measure("small", 800, 2, rounds=2)
    # The sums have another order, so the pass has run.
    assert 0 < row.error < 1e-5
    assert row.dense_ms > 0
    assert (row.model, row.length) == ("small b2", 800)
