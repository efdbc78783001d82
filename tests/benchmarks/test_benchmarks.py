"""The benchmarks' commands run and write rows with the right fields."""

import csv
import doctest
import importlib
import math
import sys
from pathlib import Path

import pytest
from bench_runs import parse, rows_of

from benchmarks import compile_time, machine, markdown, scaling, suite
from benchmarks.__main__ import main
from benchmarks.backward_time import BackwardTime
from benchmarks.breakdown import BreakdownRow
from benchmarks.compile_time import CompileRow
from benchmarks.first_step import VARIANTS
from benchmarks.layer import LayerRow
from benchmarks.results import read
from benchmarks.step_row import StepRow
from benchmarks.timing import Timing
from benchmarks.variants import DENSE_PEERS, PEERS
from benchmarks.workload import Workload

TINY = ["--backend", "aot_eager", "--device", "cpu", "--batch-size", "2", "--rounds", "2"]
MODEL = ["--model", "test_convnext", "--img-size", "64", "--min-channels", "8"]


RESULTS = [path for path in (Path(machine.__file__).parent / "results").iterdir() if path.is_dir()]


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    more = ["--peers", "--variant", "channel_multiple=1", "--output", str(tmp_path)]
    args = parse(["step", *MODEL, *TINY, *more])
    args.run(args)
    rows = rows_of(tmp_path, StepRow)
    assert [(row["variant"], row["drop_rate"]) for row in rows] == [
        ("dense", 0.0),
        ("ssprop", 0.0),
        ("ssprop", 0.8),
        ("ssprop channel_multiple=1", 0.8),
        ("eager", 0.0),
        ("module swap eager", 0.8),
        ("module swap compiled", 0.8),
    ]
    assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in rows)
    assert all(row["peak_mib"] > 0 for row in rows)
    assert rows[0]["speedup"] == 1
    assert all(row["speedup_low"] <= row["speedup"] <= row["speedup_high"] for row in rows)
    over = [row["over_plain"] for row in rows]
    assert over[1] == over[2] == 1
    assert over[3] > 0
    assert all(math.isnan(over[i]) for i in (0, 4, 5, 6))
    assert 0 < rows[0]["linear_backward_ms"] < rows[0]["backward_ms"] < rows[0]["median_ms"]
    saved = [row["saved_flops"] for row in rows]
    assert saved[0] == saved[1] == saved[4] == 0
    assert 0 < saved[2] < saved[3] < 1
    assert 0 < saved[5] == saved[6] < saved[3]
    assert (tmp_path / "step-test_convnext-64-b2-fp32-channels_last.json").exists()
    assert "allocator: " in capsys.readouterr().out


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(workload: Workload, configs: dict, rates: list[float], rounds: int) -> list:
        timing, dense = Timing.of([8, 9]), Timing.of([10, 11])
        backward = BackwardTime(conv_ms=4)
        variants = [("dense", 0.0), *(("ssprop", rate) for rate in rates)]
        return [StepRow.of(workload, *v, timing, dense, backward, 0.0, 1.0) for v in variants]

    monkeypatch.setattr(scaling, "measure", measure)
    more = ["--drop-rates", "0", "0.5", "--batch-sizes", "3", "--img-sizes", "32", "64"]
    args = parse(["scaling", *MODEL, *TINY, *more, "--output", str(tmp_path)])
    args.run(args)
    rows = rows_of(tmp_path, StepRow)
    assert [(row["batch_size"], row["img_size"]) for row in rows[::3]] == [
        (2, 64),
        (3, 64),
        (2, 32),
    ]
    assert [row["model"].split()[1:3] for row in rows[2::3]] == [
        ["64", "b2"],
        ["64", "b3"],
        ["32", "b2"],
    ]
    assert [row["drop_rate"] for row in rows] == [0.0, 0.0, 0.5] * 3
    assert (tmp_path / "scaling-test_convnext-64-b2-fp32-channels_last.json").exists()


@pytest.mark.slow
def test_scaling_measures_each_point(tmp_path: Path) -> None:
    more = ["--drop-rates", "0", "0.5", "--batch-sizes", "3", "--output", str(tmp_path)]
    args = parse(["scaling", *MODEL, *TINY, *more])
    args.run(args)
    assert all(row["median_ms"] > 0 for row in rows_of(tmp_path, StepRow))


def test_layer(tmp_path: Path) -> None:
    more = ["--layers", "v2 depth", "grouped", "64-64 3x3 at 56", "vit", "--output"]
    args = parse(["layer", *TINY, *more, str(tmp_path)])
    args.run(args)
    rows = rows_of(tmp_path, LayerRow)
    assert [(row["drop_rate"], row["channels"], row["kept"]) for row in rows] == [
        *((0.5, 64, 32), (0.8, 64, 16)),
        *((0.5, 144, 72), (0.8, 144, 32)),
        *((0.5, 320, 160), (0.8, 320, 80)),
        *((0.5, 1536, 768), (0.8, 1536, 304)),
    ]
    for row in rows:
        assert row["ideal_gain"] == row["channels"] / row["kept"]
        assert row["gain"] == row["dense_ms"] / row["sparse_ms"]
        assert all(value > 0 for name, value in row.items() if name.endswith("_ms"))


def test_layers_of_a_model(tmp_path: Path) -> None:
    more = ["--model", "test_resnet", "--img-size", "32", "--drop-rates", "0.5", "--layers"]
    args = parse(["layer", *TINY, *more, "layer4", "--output", str(tmp_path)])
    args.run(args)
    assert {row["layer"].split(".")[0] for row in rows_of(tmp_path, LayerRow)} == {
        "test_resnet layer4"
    }


def test_an_unknown_layer_is_an_error() -> None:
    args = parse(["layer", *TINY, "--layers", "no such"])
    with pytest.raises(ValueError, match=r"--layers must be part of one of .*vgg16.*no such"):
        args.run(args)


def test_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of three rounds the machine is half as fast."""
    seen: list[tuple[str, str]] = []

    def first_step(workload: Workload, variant: str, cache: str) -> dict[str, float]:
        slowness = 2.0 if 6 <= len(seen) < 12 else 1.0
        sparse = 12.0 if len(seen) < 6 else 10.0
        cold_s = {"dense": 8.0, "sparse": sparse, "samples": 16.0}[variant]
        seconds = 1.0 if (variant, cache) in seen else cold_s
        seen.append((variant, cache))
        return {"compile_s": slowness * seconds, "import_s": 0.1}

    monkeypatch.setattr(compile_time, "_first_step", first_step)
    command = ["compile", "--models", "test_resnet", *TINY[:-2], "--rounds", "3"]
    args = parse([*command, "--output", str(tmp_path)])
    args.run(args)
    rows = rows_of(tmp_path, CompileRow)
    assert [(r["variant"], r["cold_s"], r["warm_s"], r["ratio"]) for r in rows] == [
        ("dense", 8.0, 1.0, 1.0),
        ("sparse", 12.0, 1.0, 1.25),
        ("samples", 16.0, 1.0, 2.0),
    ]
    assert (rows[1]["ratio_low"], rows[1]["ratio_high"]) == (1.25, 1.5)
    # Each variant runs cold and then warm with its own cache; the second round reverses the order.
    order = [*VARIANTS, *VARIANTS[::-1], *VARIANTS]
    assert [variant for variant, _ in seen[::2]] == order
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == 9


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_second_process_finds_the_first_ones_cache(variant: str, tmp_path: Path) -> None:
    workload = Workload(model="test_resnet", batch_size=2, img_size=32)
    cold, warm = (compile_time._first_step(workload, variant, str(tmp_path)) for _ in range(2))
    assert 0 < 2 * warm["compile_s"] < cold["compile_s"]
    assert cold["import_s"] > 0


def test_a_failing_process_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    workload = Workload(model="test_resnet", batch_size=2, img_size=32)
    with pytest.raises(RuntimeError, match=r"test_resnet.* failed"):
        compile_time._first_step(workload, "dense", "unused")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_suite_is_made_of_valid_commands(device: str) -> None:
    commands = list(suite.commands(device, "folder"))
    assert all(parse(command).device == device for command in commands)
    assert {command[0] for command in commands} == set(suite.KINDS)


def test_the_suite_goes_on_after_a_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"]
    bad = [sys.executable, "-c", "raise SystemExit(3)"]
    assert suite.run_all([bad, good]) == 1
    assert (tmp_path / "ran").exists()
    printed = capfd.readouterr().out
    assert "1 of 2 runs succeeded" in printed
    assert "failed: " in printed
    assert suite.run_all([good]) == 0


def test_suite_of_some_models(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--output", "folder", "--device", "cpu", "--dry-run"]
    args = parse(["suite", *where, "--only", "step", "scaling", "--models", "vgg16"])
    args.run(args)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[3:6] for line in printed] == [
        ["step", "--model", "vgg16"],
        ["scaling", "--model", "vgg16"],
    ]


def test_unknown_fields_of_a_variant_are_an_error() -> None:
    args = parse(["step", *MODEL, *TINY, "--variant", "channels=3"])
    with pytest.raises(ValueError, match=r"--variant must be .*min_channels.*'channels=3'"):
        args.run(args)


def record(variant: str, drop_rate: float, speedup: float) -> dict:
    figures = {"median_ms": 100 / speedup, "speedup": speedup, "bound": 2.0, "efficiency": 0.9}
    return {"model": "m", "variant": variant, "drop_rate": drop_rate, **figures}


def test_table_of_one_variant() -> None:
    rows = [record("dense", 0, 1), record("drop 0", 0, 1), record("drop 0.8", 0.8, 1.6)]
    assert markdown.markdown([rows], 0.8).splitlines() == [
        "| model, resolution, batch | dense ms | sparse ms | speed-up | bound | efficiency |",
        "| --- | --- | --- | --- | --- | --- |",
        "| m | 100 | 62 | 1.60 | 2.00 | 0.90 |",
    ]


def test_table_of_variants_and_peers() -> None:
    rows = [record("dense", 0, 1), record("ssprop", 0, 1), record("ssprop", 0.5, 1.3)]
    rows += [record("ssprop", 0.8, 1.6), record("ssprop x=1", 0.8, 1.7)]
    rows += [record(peer, 0.8 * (peer not in DENSE_PEERS), 0.7) for peer in PEERS]
    rows += [record(PEERS[-1], 0.5, 0.6)]
    lines = markdown.markdown([rows], 0.8).splitlines()
    assert lines[0].endswith("| efficiency | " + " | ".join(PEERS) + " |")
    assert lines[2:] == [
        "| m | ssprop | 100 | 62 | 1.60 | 2.00 | 0.90 | 0.70 | 0.70 | 0.70 | 0.70 |",
        "| m | ssprop x=1 | 100 | 59 | 1.70 | 2.00 | 0.90 | 0.70 | 0.70 | 0.70 | 0.70 |",
    ]


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_saved_results_make_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(["table", str(folder)])
    args.run(args)
    files = [*folder.glob("step-*.json"), *folder.glob("samples-*.json")]
    assert len(capsys.readouterr().out.splitlines()) >= 2 + len(files)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_saved_results_are_exported(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    args = parse(["export", str(folder), "--output", str(tmp_path / "made")])
    args.run(args)
    made = tmp_path / "made"
    for path in folder.glob("*.json"):
        with (made / f"{path.stem}.csv").open() as file:
            lines = list(csv.DictReader(file))
        records = read(path)
        texts = [{name: str(value) for name, value in row.items()} for row in records]
        assert lines == texts
        is_drawn = path.stem.split("-")[0] in ("step", "scaling", "layer")
        assert (made / f"{path.stem}.png").exists() == is_drawn
    assert all(path.stat().st_size > 1000 for path in made.glob("*.png"))
    assert not list(made.glob("*.json"))


def test_export_writes_beside_the_results_by_default(tmp_path: Path) -> None:
    (tmp_path / "compile-m.json").write_text('{"rows": [{"model": "m", "cold_s": 1.5}]}')
    args = parse(["export", str(tmp_path)])
    args.run(args)
    assert (tmp_path / "compile-m.csv").read_text().split() == ["model,cold_s", "m,1.5"]


def test_export_of_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    args = parse(["export", str(tmp_path)])
    with pytest.raises(ValueError, match="has no JSON file"):
        args.run(args)


def test_a_step_without_a_drop_rate_is_an_error() -> None:
    args = parse(["step", *MODEL, *TINY, "--drop-rates", "0"])
    with pytest.raises(ValueError, match="--drop-rates must have one above 0"):
        args.run(args)


def test_help_names_every_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    for name in ("step", "layer", "compile", "scaling", "suite", "table", "export"):
        assert f"    {name} " in printed


MODULES = [path.stem for path in Path(machine.__file__).parent.glob("[!_]*.py")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


@pytest.mark.slow
def test_breakdown(tmp_path: Path) -> None:
    """Runs under Inductor, because `breakdown` replaces the operators in Inductor's code."""
    args = parse(["breakdown", *MODEL, *TINY[2:], "--output", str(tmp_path)])
    args.run(args)
    dense, sparse = rows_of(tmp_path, BreakdownRow)
    parts = ("forward_ms", "conv_ms", "product_ms", "topk_ms", "rest_ms")
    for row in (dense, sparse):
        assert sum(row[part] for part in parts) == pytest.approx(row["step_ms"], rel=0.5)
        assert row["conv_ms"] > 0
        assert row["product_ms"] > 0
    assert dense["topk_ms"] == 0
