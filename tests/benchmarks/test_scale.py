"""The model of data-parallel steps: closed forms, what is counted, the command."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from bench_runs import parse, rows_of

from benchmarks.communication import Communication, Job, Kept, measure
from benchmarks.scale import markdown
from benchmarks.scale_check import CheckRow, check, fit
from benchmarks.scale_model import Network, Part, Step, faster_below_gbits
from benchmarks.scale_rows import Inputs, LimitRow, ScaleRow, limits, scale

GIGABYTE_S = 8.0
INPUTS = Inputs(
    model="m 224 b16",
    drop_rate=0.8,
    dense_forward_ms=100.0,
    dense_backward_ms=200.0,
    sparse_forward_ms=100.0,
    sparse_backward_ms=100.0,
    packing_ms=10.0,
    gradient_bytes=100_000_000,
    buckets=4,
    kept_bytes=25_000_000,
    row_bytes=0,
    score_bytes=0,
    layers=50,
    kept_share=0.25,
)


@pytest.mark.parametrize(("ranks", "factor"), [(1, 0.0), (2, 1.0), (4, 1.5), (64, 126 / 64)])
def test_a_ring_sends_each_byte_twice_but_for_its_own_part(ranks: int, factor: float) -> None:
    # 100 MB at 1 GB/s take 100 ms.
    ms = Network(ranks, GIGABYTE_S, 0.0).all_reduce_ms(Part(100_000_000, 1))
    assert ms == pytest.approx(100 * factor)


def test_latency_counts_twice_for_each_other_rank_and_message() -> None:
    assert Network(4, GIGABYTE_S, 50.0).all_reduce_ms(Part(0, 10)) == pytest.approx(2 * 3 * 0.5)


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [(0, 30 + 1 + 40 + 100), (0.5, 30 + 1 + 40 + 90), (1, 30 + 1 + 40 + 80)],
)
def test_a_step_is_arithmetic_and_what_is_not_hidden(overlap: float, expected: float) -> None:
    step = Step(10, 20, Part(100_000_000, 0), (Part(40_000_000, 0),), packing_ms=1)
    assert step.ms(Network(2, GIGABYTE_S, 0), overlap) == pytest.approx(expected)
    # What is hidden whole costs nothing.
    quick = Network(2, 1000 * GIGABYTE_S, 0)
    assert replace(step, serial=()).ms(quick, 1) == pytest.approx(31)


def test_rows_at_a_bandwidth() -> None:
    (row,) = scale(INPUTS, 2, 0.0, 0.0, [GIGABYTE_S])
    assert (row.dense_ms, row.sparse_ms, row.kept_ms) == pytest.approx((400, 300, 235))
    assert (row.sparse_speedup, row.kept_speedup) == pytest.approx((400 / 300, 400 / 235))


def test_limits_against_their_closed_forms() -> None:
    found = limits(INPUTS, 2, 0.0, 0.0)
    # Between two ranks at x seconds a gigabyte, whole gradients take 100 x ms, kept ones 25 x.
    # 300 + 100 x = 1.1 (200 + 100 x); 10 + 25 x = 100 x; 100 x = 0.05 * 300.
    expected = (GIGABYTE_S / 8, GIGABYTE_S * 7.5, GIGABYTE_S / 0.15)
    limited = (found.little_below, found.kept_below, found.free_above)
    assert limited == pytest.approx(expected, rel=1e-5)
    assert found.wins_below == math.inf
    # 90 ms are saved; 50 layers and 4 buckets of rows wait for two messages each.
    assert found.latency_limit_us == pytest.approx(90e3 / (2 * 54))
    slow = limits(INPUTS, 2, 1.01 * found.latency_limit_us, 0.0)
    assert 0 < slow.wins_below < 1e4
    hidden = limits(INPUTS, 2, 0.0, 1.0)
    # All of the backward, 200 ms, and 5 % of the step.
    assert hidden.free_above == pytest.approx(GIGABYTE_S / 2.15, rel=1e-5)


def test_where_nothing_changes() -> None:
    assert faster_below_gbits(lambda gbits: True) == math.inf
    assert faster_below_gbits(lambda gbits: False) == 0


def test_a_network_is_found_again_from_its_times() -> None:
    network = Network(4, gbits=5.0, latency_us=30.0)
    sizes = {size: network.all_reduce_ms(Part(size, 1)) for size in (1000, 10**6, 10**8)}
    parts = {name: Part(10**6, 3) for name in ("gradients", "rows", "kept", "scores")}
    times = {"gradients_ms": 9.0, "kept_ms": 8.0, "packing_ms": 2.0, "scores_ms": 7.0}
    found = Communication(**parts, **times, sizes_ms=sizes, what=Kept({}, ()))
    fitted = fit(found, 4)
    assert (fitted.gbits, fitted.latency_us) == pytest.approx((5.0, 30.0))
    rows = {row.what: row for row in check({4: found}, found)}
    assert [rows[f"all-reduce of {size} bytes"].ratio for size in sizes] == pytest.approx([1] * 3)
    ms = network.all_reduce_ms(Part(10**6, 3))
    # Kept rows: two such parts, and the 2 ms that packing takes one rank.
    model = [rows[what].model_ms for what in ("gradients", "kept rows", "scores")]
    assert model == pytest.approx([ms, 2 * ms + 2, ms])


def test_a_fit_is_off_by_as_much_below_as_above() -> None:
    network = Network(2, gbits=8.0, latency_us=100.0)
    sizes = [4**power for power in range(6, 14)]
    times = {size: network.all_reduce_ms(Part(size, 1)) for size in sizes}
    times[sizes[3]] *= 10
    times[sizes[6]] *= 10
    parts = {name: Part(1, 1) for name in ("gradients", "rows", "kept", "scores")}
    other = dict.fromkeys(("gradients_ms", "kept_ms", "packing_ms", "scores_ms"), 1.0)
    found = Communication(**parts, **other, sizes_ms=times, what=Kept({}, ()))
    ratios = [row.ratio for row in check({2: found}, found)[: len(sizes)]]
    assert math.prod(ratios) == pytest.approx(1)
    fitted = fit(found, 2)

    def error(network: Network) -> float:
        model = [network.all_reduce_ms(Part(size, 1)) for size in sizes]
        return sum(math.log(t / m) ** 2 for t, m in zip(times.values(), model, strict=True))

    for factor in (0.99, 1.01):
        assert error(replace(fitted, gbits=fitted.gbits * factor)) > error(fitted)
        assert error(replace(fitted, latency_us=fitted.latency_us * factor)) > error(fitted)


ROOT = Path(__file__).parents[2]
SAVED = ROOT / "benchmarks" / "results" / "cpu-2-cores"


def saved(kind: str, row: type) -> list:
    content = json.loads((SAVED / f"scale-resnet50{kind}.json").read_text())
    return [row(**record) for record in content["rows"]]


def test_the_tables_of_the_documentation_are_of_the_saved_results() -> None:
    (inputs,) = saved("-inputs", Inputs)
    bounds = saved("-limits", LimitRow)
    page = (ROOT / "docs" / "scale.md").read_text()
    assert markdown(inputs, bounds, saved("-check", CheckRow)) in page
    # And these are what the model makes of the inputs.
    for row in bounds:
        assert limits(inputs, row.ranks, row.latency_us, row.overlap) == row
    for row in saved("", ScaleRow):
        assert [row] == scale(inputs, row.ranks, row.latency_us, row.overlap, [row.gbits])


TINY = {"model": "test_resnet", "drop_rate": 0.8, "img_size": 32, "batch_size": 2, "rounds": 1}


def test_what_is_counted_of_a_step() -> None:
    job = Job(**TINY, min_channels=16)
    found = measure(job)
    model = timm.create_model("test_resnet")
    tables = [p for p in model.parameters() if p.ndim > 1]
    assert found.gradients.size == 4 * sum(p.numel() for p in model.parameters())
    assert found.rows.size == sum(len(table) for table in tables)
    assert found.gradients.messages == found.kept.messages >= found.rows.messages > 0
    assert found.kept.size < 0.5 * found.gradients.size
    # The classifier is left out.
    assert found.scores.messages == len(tables) - 1
    assert found.scores.size == 4 * (found.rows.size - model.num_classes)
    # Without a sparse step, the same is sent.
    again = measure(job, kept=found.what)
    for part in ("gradients", "rows", "kept", "scores"):
        assert getattr(again, part) == getattr(found, part)


@pytest.mark.slow
def test_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    times = {"model": "test_resnet 32 b2", "step_ms": 3.0, "forward_ms": 1.0}
    rows = [{**times, "drop_rate": rate} for rate in (0.0, 0.8)]
    steps = tmp_path / "breakdown.json"
    steps.write_text(json.dumps({"rows": rows}))
    command = ["scale", "--steps", str(steps), "--ranks", "2", "4", "--gbits", "1", "10"]
    tiny = ["--img-size", "32", "--batch-size", "2", "--rounds", "1", "--min-channels", "16"]
    args = parse([*command, *tiny, "--check", "2", "--output", str(tmp_path)])
    args.run(args)
    assert "2 ranks: " in capsys.readouterr().out
    kinds = {"": ScaleRow, "-inputs": Inputs, "-limits": LimitRow, "-check": CheckRow}
    for kind, row in kinds.items():
        folder = tmp_path / f"only{kind}"
        folder.mkdir()
        for path in tmp_path.glob(f"scale-test_resnet{kind}.*"):
            path.rename(folder / path.name)
        rows_of(folder, row)
    assert len(json.loads(next((tmp_path / "only").glob("*.json")).read_text())["rows"]) == 8
    assert len(list((tmp_path / "only").glob("*.png"))) == 1
