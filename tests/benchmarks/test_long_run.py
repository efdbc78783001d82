"""The long run: what counts as growth, and the command."""

import pytest
from bench_runs import parse

from benchmarks import long_run
from benchmarks.long_run import WARMUP, EpochRow, growth, measure


def rows(memory: float = 0.0, graphs: int = 0) -> list[EpochRow]:
    """40 epochs: memory grows by `memory` MiB per epoch after the warm-up, and more before it."""
    return [
        EpochRow(
            epoch=epoch,
            steps=10 * (epoch + 1),
            drop_rate=0.8 * (epoch % 2),
            rss_mib=1000.0 + 100 * min(epoch, WARMUP - 1) + memory * max(epoch - WARMUP + 1, 0),
            graphs=5 + min(epoch, WARMUP - 1) + graphs * (epoch == 39),
        )
        for epoch in range(40)
    ]


def test_what_grows_is_named() -> None:
    assert growth(rows()) == []
    # 36 epochs of 0.3 MiB are less than 1 % of 1300 MiB; 36 epochs of 0.4 MiB are more.
    assert growth(rows(memory=0.3)) == []
    assert growth(rows(memory=0.4)) == ["memory grew from 1300.0 to 1314.4 MiB"]
    assert growth(rows(graphs=1)) == ["graphs grew from 8 to 9"]
    assert len(growth(rows(memory=1.0, graphs=1))) == 2


def test_a_run_without_an_epoch_after_the_warm_up_tells_nothing() -> None:
    with pytest.raises(ValueError, match="more than 4 epochs, got 4"):
        growth(rows()[:WARMUP])


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_a_check_fails_where_memory_grows(
    memory: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long_run, "measure", lambda *settings: rows(memory))
    args = parse(["long", "--check"])
    if memory:
        with pytest.raises(SystemExit, match="1"):
            args.run(args)
        assert "memory grew" in capsys.readouterr().out
    else:
        args.run(args)
        assert "neither memory nor graphs grew" in capsys.readouterr().out


@pytest.mark.slow
def test_long() -> None:
    found = measure("test_resnet", steps=40, batch_size=256, backend="aot_eager")
    assert [row.steps for row in found] == [8, 16, 24, 32, 40]
    assert [row.drop_rate for row in found] == [0, 0.8, 0, 0.8, 0]
    assert all(row.rss_mib > 0 for row in found)
    assert found[-1].graphs == found[1].graphs > found[0].graphs
