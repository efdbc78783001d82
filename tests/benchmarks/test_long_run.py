"""The long run: slopes with their errors, what the documentation says of them, the command."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from bench_runs import parse, rows_of

from benchmarks.long_run import WARMUP, EpochRow, markdown, slope, slopes

ROOT = Path(__file__).parents[2]
SAVED = ROOT / "benchmarks" / "results" / "cpu-2-cores" / "long-test_resnet.json"
STEPS = [100 * (epoch + 1) for epoch in range(85)]


def test_a_straight_line_is_found_with_its_error() -> None:
    # Residuals of 1, -2, 1: of their squares' sum, 6, one degree of freedom is left, and the
    # deviations of 0, 1, 2 from their mean have squares that add up to 2.
    found = slope("x", [0, 1000, 2000], [1.0, 1.0, 7.0])
    assert (found.per_1000, found.error) == pytest.approx((3.0, 3**0.5))
    assert (*found.first, *found.last) == pytest.approx((0, 0, 2000, 6))
    assert found.is_flat
    constant = slope("x", STEPS, [1372.875] * 85)
    assert (constant.per_1000, constant.error, constant.is_flat) == (0, 0, True)
    growing = slope("x", STEPS, [1372.875 + 0.001 * epoch for epoch in range(85)])
    assert growing.per_1000 == pytest.approx(0.01)
    assert not growing.is_flat


@pytest.mark.parametrize("likeness", [0.0, 0.5])
def test_the_error_allows_for_values_like_those_before_them(likeness: float) -> None:
    generator = np.random.default_rng(0)
    outside = 0
    for _ in range(400):
        noise = generator.normal(size=85)
        for index in range(1, 85):
            noise[index] += likeness * noise[index - 1]
        found = slope("x", STEPS, noise)
        outside += abs(found.per_1000) > 2 * found.error
    # For independent values 5 %; taken for independent, those that are not give 24 %.
    assert outside / 400 < 0.1


def rows(sparse_rise: float = 0.0, machine: float = 0.0) -> list[EpochRow]:
    return [
        EpochRow(
            epoch=epoch,
            steps=10 * (epoch + 1),
            drop_rate=0.8 * (epoch % 2),
            step_ms=(20 - 10 * (epoch % 2)) * (1 + machine * epoch)
            + sparse_rise * epoch * (epoch % 2)
            # The first epochs compile.
            + 1000 * (epoch < WARMUP),
            rss_mib=100.0,
            graphs=5,
        )
        for epoch in range(40)
    ]


def test_slopes_of_a_run() -> None:
    names = ("dense step, ms", "sparse step, ms", "sparse / dense", "memory, MiB", "graphs")
    assert [line.name for line in slopes(rows())] == list(names)
    assert all(line.is_flat for line in slopes(rows()))
    not_flat = [line.name for line in slopes(rows(sparse_rise=0.1)) if not line.is_flat]
    assert not_flat == ["sparse step, ms", "sparse / dense"]
    # What the machine does to both kinds of step is not in their ratio.
    not_flat = [line.name for line in slopes(rows(machine=0.01)) if not line.is_flat]
    assert not_flat[:2] == list(names[:2])
    ratio = slopes(rows(machine=0.01))[2]
    assert abs(ratio.per_1000) < 0.2


def test_the_table_of_the_documentation_is_of_the_saved_run() -> None:
    saved = [EpochRow(**row) for row in json.loads(SAVED.read_text())["rows"]]
    assert saved[-1].steps >= 5000
    page = (ROOT / "docs" / "trust.md").read_text()
    assert markdown(slopes(saved)) in page, "python -m benchmarks long --saved prints it anew"


def test_a_saved_run_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    shutil.copy(SAVED, tmp_path)
    args = parse(["long", "--saved", str(tmp_path / SAVED.name)])
    args.run(args)
    assert "| sparse / dense | " in capsys.readouterr().out
    assert (tmp_path / SAVED.with_suffix(".png").name).stat().st_size > 1000


@pytest.mark.parametrize("rise", [0.0, 0.1])
def test_a_check_fails_where_sparse_steps_take_longer(rise: float, tmp_path: Path) -> None:
    file = tmp_path / "long.json"
    file.write_text(json.dumps({"rows": [asdict(row) for row in rows(sparse_rise=rise)]}))
    args = parse(["long", "--saved", str(file), "--check"])
    if rise:
        with pytest.raises(SystemExit, match=r"sparse / dense: \+"):
            args.run(args)
    else:
        args.run(args)


@pytest.mark.slow
def test_long(tmp_path: Path) -> None:
    command = ["long", "--steps", "25", "--batch-size", "256", "--backend", "aot_eager"]
    args = parse([*command, "--output", str(tmp_path)])
    args.run(args)
    found = [EpochRow(**row) for row in rows_of(tmp_path, EpochRow)]
    assert [row.steps for row in found] == [8, 16, 24, 32]
    assert [row.drop_rate for row in found] == [0, 0.8, 0, 0.8]
    assert all(row.step_ms > 0 and row.rss_mib > 0 for row in found)
    assert found[-1].graphs == found[1].graphs
    assert asdict(found[0]).keys() == EpochRow.__annotations__.keys()
