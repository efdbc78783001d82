"""The model of data-parallel steps: closed forms, counted bytes, the command."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
from bench_runs import parse, rows_of

from benchmarks import communication, scale
from benchmarks.communication import Communication
from benchmarks.results import read
from benchmarks.scale import GBITS, LATENCY_US, RANKS, Inputs, Network, markdown, step_times

ROOT = Path(__file__).parents[2]
GIGABYTE_S = 8.0
SENT = Communication(
    gradient_bytes=100_000_000,
    buckets=4,
    kept_bytes=25_000_000,
    row_bytes=0,
    score_bytes=0,
    layers=50,
    packing_ms=10.0,
)
INPUTS = Inputs(
    **asdict(SENT),
    model="m 224 b16",
    drop_rate=0.8,
    dense_forward_ms=100.0,
    dense_backward_ms=200.0,
    sparse_forward_ms=100.0,
    sparse_backward_ms=100.0,
)


@pytest.mark.parametrize(("ranks", "factor"), [(1, 0.0), (2, 1.0), (4, 1.5), (64, 126 / 64)])
def test_a_ring_sends_each_byte_twice_except_its_own_part(ranks: int, factor: float) -> None:
    # 100 MB at 1 GB/s take 100 ms.
    ms = Network(ranks, GIGABYTE_S, 0.0).all_reduce_ms(100_000_000, 1)
    assert ms == pytest.approx(100 * factor)


def test_latency_counts_twice_for_each_other_rank_and_message() -> None:
    assert Network(4, GIGABYTE_S, 50.0).all_reduce_ms(0, 10) == pytest.approx(2 * 3 * 0.5)


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        # Between two ranks, whole gradients take 100 ms and kept rows 25 ms.
        (0, (300 + 100, 200 + 100, 200 + 25 + 10)),
        (0.25, (300 + 50, 200 + 75, 200 + 10)),
        (1, (300, 200, 210)),
    ],
)
def test_a_step_is_arithmetic_and_what_is_not_hidden(overlap: float, expected: tuple) -> None:
    assert step_times(INPUTS, Network(2, GIGABYTE_S, 0), overlap) == pytest.approx(expected)


def test_the_backward_waits_for_scores_and_rows() -> None:
    inputs = replace(INPUTS, score_bytes=3_000_000, row_bytes=2_000_000)
    *_, kept = step_times(inputs, Network(2, GIGABYTE_S, 0), 1)
    assert kept == pytest.approx(210 + 5)
    # 50 layers and 4 buckets each wait for two messages of 1 ms; the kept rows are hidden.
    *_, kept = step_times(inputs, Network(2, GIGABYTE_S, 1000), 1)
    assert kept == pytest.approx(210 + 5 + 2 * 54)


def test_the_tables_of_the_documentation_are_of_the_saved_inputs() -> None:
    (record,) = read(ROOT / "benchmarks/results/cpu-2-cores/scale-resnet50.json")
    made = markdown(Inputs(**record), RANKS, GBITS, LATENCY_US).split("\n\n")
    page = (ROOT / "docs" / "scale.md").read_text()
    assert len(made) == 2
    assert all(f"\n\n{table}\n\n" in page for table in made), "python -m benchmarks scale"


def test_what_is_counted_of_a_step() -> None:
    found = communication.measure("test_resnet", 0.8, min_channels=16, rounds=1)
    model = timm.create_model("test_resnet")
    tables = [p for p in model.parameters() if p.ndim > 1]
    assert found.gradient_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert found.row_bytes == sum(len(table) for table in tables)
    assert found.buckets > 0
    assert 0 < found.kept_bytes < 0.5 * found.gradient_bytes
    # The classifier does not take part.
    assert found.layers == len(tables) - 1
    assert found.score_bytes == 4 * (found.row_bytes - model.num_classes)


def test_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(scale, "measure", lambda *what: asked.append(what) or SENT)
    times = [{"step_ms": 300.0, "forward_ms": 100.0}, {"step_ms": 200.0, "forward_ms": 100.0}]
    rows = [
        {"model": "m 224 b16", "drop_rate": rate, **ms}
        for rate, ms in zip((0.0, 0.8), times, strict=True)
    ]
    steps = tmp_path / "breakdown.json"
    steps.write_text(json.dumps({"rows": rows}))
    network = ["--ranks", "2", "--gbits", f"{GIGABYTE_S:g}", "--latency-us", "0"]
    folder = tmp_path / "results"
    args = parse(["scale", "--steps", str(steps), "--output", str(folder), *network])
    args.run(args)
    assert asked == [("m", 0.8)]
    printed = capsys.readouterr().out
    # 400 / 300, 400 / 235, 300 / 200 and 300 / 210.
    for line in ("0 | gradients | 1.33", "0 | kept rows | 1.70"):
        assert f"| 2 | {line} |" in printed
    for line in ("1 | gradients | 1.50", "1 | kept rows | 1.43"):
        assert f"| 2 | {line} |" in printed
    assert rows_of(folder, Inputs) == [asdict(INPUTS)]
    args = parse(["scale", "--inputs", str(folder / "scale-m.json"), *network])
    args.run(args)
    assert capsys.readouterr().out == printed
    assert len(asked) == 1
