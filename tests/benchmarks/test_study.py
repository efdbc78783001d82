"""The study: its grids, its costs, its page, and one small run."""

import json
import math
import re
import zipfile
from pathlib import Path

import pytest

from benchmarks.study import __main__ as command
from benchmarks.study.cost import Cost, cost, dense_accuracy, time_per_saving
from benchmarks.study.data import unpack
from benchmarks.study.grid import GRIDS, settings
from benchmarks.study.page import page, verdict
from benchmarks.study.store import append_result, read_results
from benchmarks.study.summary import spread, summarize
from benchmarks.study.task import Task
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.setup import sparsity_config

ROOT = Path(__file__).parents[2]
TASK = Task(
    name="toy",
    about="A toy.",
    flags={},
    settings={
        "dense": {},
        "dense-4ep": {"epochs": 4},
        "half": {"schedule": "constant:rate=0.5 until 1ep then none", "gate": False},
        "narrow": {"model_kwargs": {"width": 16}},
        "never-run": {},
    },
)


def result(setting, seed, accuracy, *, epochs=8, saved=0.0, flops=100):
    return {
        **{"task": "toy", "setting": setting, "seed": seed, "accuracy": accuracy},
        **{"epochs": epochs, "backward_saved": saved, "forward_flops": flops},
        **{"device": "here", "threads": 1, "torch": "2", "commit": "c", "allocator": "a"},
    }


RESULTS = [
    result("dense", 1, 70.0),
    result("dense", 2, 72.0),
    result("dense-4ep", 1, 60.0, epochs=4),
    result("dense-4ep", 2, 62.0, epochs=4),
    # 8 epochs that save 2/3 * 0.375 cost as much as 6 dense epochs, which reach 66.
    result("half", 1, 69.0, saved=0.375),
    result("half", 2, 71.0, saved=0.375),
    result("narrow", 1, 50.0, flops=25),
]


@pytest.mark.parametrize("grid", GRIDS)
def test_names_in_a_grid_are_unique_and_every_flag_is_right(grid):
    keys = [setting.key for setting in settings(grid)]
    assert len(set(keys)) == len(keys)
    for setting in settings(grid):
        sparsity_config(TrainConfig.from_settings(setting.flags))


@pytest.mark.parametrize("grid", GRIDS)
def test_every_task_has_a_dense_curve_and_starts_from_weights_that_are_made_before(grid):
    made = set()
    for task in GRIDS[grid]:
        if task.name == "start":
            made |= set(task.settings)
            continue
        assert {task.start, *task.starts.values()} <= {None, *made}
        epochs = {
            {**task.flags, **flags}["epochs"]
            for name, flags in task.settings.items()
            if name.startswith("dense")
        }
        assert len(epochs) >= 3


def test_a_step_that_leaves_out_all_of_the_backward_costs_a_third():
    assert cost(9, 1.0, 1.0, 0.5).arithmetic == pytest.approx(3.0)
    assert cost(9, 0.0, 0.5, 0.5) == Cost(4.5, 4.5)
    assert cost(9, 1.0, 1.0, 0.5).time == pytest.approx(4.5)


def test_time_is_that_of_a_measured_step(tmp_path):
    rows = [
        {"variant": "dense", "drop_rate": 0.8, "speedup": 1.0, "saved_flops": 0.0},
        {"variant": "ssprop", "drop_rate": 0.8, "speedup": 1.6, "saved_flops": 0.75},
    ]
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"rows": rows}))
    assert time_per_saving(path) == pytest.approx(0.5)
    # The backward takes two thirds of the arithmetic, maybe more of the time, but never all.
    assert 0 < time_per_saving() < 1


def test_dense_accuracy_is_known_on_the_curve_alone():
    curve = [(8.0, 70.0), (4.0, 60.0)]
    assert dense_accuracy(curve, 5.0) == 62.5
    assert dense_accuracy(curve, 8.0) == 70.0
    assert dense_accuracy(curve, 3.9) is None
    assert dense_accuracy([(8.0, 70.0)], 8.0) == 70.0
    assert dense_accuracy([], 8.0) is None


def test_spread_is_pooled_over_settings():
    # Variances 2 with one degree of freedom and 1 with two.
    assert spread([[1.0, 3.0], [1.0, 2.0, 3.0], [5.0]]) == pytest.approx(math.sqrt(4 / 3))
    assert spread([[1.0]]) is None


def test_rows_compare_with_dense_training_of_the_same_cost():
    rows = {row.name: row for row in summarize(TASK, RESULTS, per_saving=1 / 3)}
    assert list(rows) == ["dense", "dense-4ep", "half", "narrow"]
    half = rows["half"]
    assert (half.seeds, half.accuracy) == (2, 70.0)
    assert half.cost.arithmetic == pytest.approx(6.0)
    assert half.cost.time == pytest.approx(7.0)
    assert half.gain == pytest.approx(70 - 66)
    assert half.gain_in_time == pytest.approx(70 - 68.5)
    assert half.error == pytest.approx(math.sqrt(2) * math.sqrt(1 / 2 + 1 / 2))
    assert rows["narrow"].cost.arithmetic == pytest.approx(2.0)
    assert rows["narrow"].gain is None
    assert rows["dense-4ep"].gain is None


@pytest.mark.parametrize(
    ("gain", "error", "expected"),
    [
        (1.0, 0.4, "better"),
        (-1.0, 0.4, "worse"),
        (0.8, 0.4, "equal"),
        (None, 0.4, ""),
        (1, None, ""),
    ],
)
def test_a_difference_counts_beyond_two_standard_errors(gain, error, expected):
    assert verdict(gain, error) == expected


def test_the_page_shows_what_was_run(tmp_path):
    for found in RESULTS:
        append_result(tmp_path / "toy.jsonl", found)
    text = page([TASK], read_results(tmp_path / "toy.jsonl"))
    assert '| half | `--schedule "constant:rate=0.5 until 1ep then none" --no-gate` | 2 |' in text
    assert "70.00 ± 1.41 | 0.75 | +4.00 ± 1.41 |" in text.replace("**", "")
    assert "- **toy**: `never-run`" in text
    assert "| never-run" not in text
    assert "narrow" in text
    assert "at equal arithmetic: better: `half`" in text
    assert "at equal arithmetic 1 of 1 rows are better than dense training, 0 equal" in text
    assert "7 runs on here" in text


def test_the_page_and_what_the_readme_says_of_it_are_made_from_the_results():
    made = page(GRIDS["small"], read_results(ROOT / "benchmarks/study/results/small.jsonl"))
    assert (ROOT / "docs/study-channels.md").read_text() == made, "python -m benchmarks.study table"
    table = (ROOT / "docs/performance.md").read_text().split("| accuracy in %")[1].split("\n\n")[0]
    claims = re.findall(r"(\d+\.\d\d ± \d+\.\d\d) at (\d\.\d\d)", table)
    assert len(claims) >= 10
    for accuracy, cost_ in claims:
        assert f"| {accuracy} | {cost_} |" in made


def test_what_has_a_result_is_not_run_again(tmp_path, monkeypatch):
    from benchmarks.study import runner

    ran = []

    def run_one(setting, seed, places):
        run = {"task": setting.task.name, "setting": setting.name, "seed": seed}
        append_result(places.results, run)
        ran.append((setting.key, seed))
        return {"accuracy": 0.0}

    monkeypatch.setattr(runner, "run_one", run_one)
    study(monkeypatch, tmp_path, "run", "--only", "digits/dense*", "--seeds", "1")
    assert [seed for _, seed in ran] == [1] * len(ran)
    first = list(ran)
    study(monkeypatch, tmp_path, "run", "--only", "digits/dense*", "--minutes", "0")
    assert ran == first
    study(monkeypatch, tmp_path, "run", "--only", "digits/dense*", "--seeds", "1", "2")
    assert ran == first + [(key, 2) for key, _ in first]


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_cut_line_loses_its_own_run_alone(tmp_path, end):
    path = tmp_path / "results" / "toy.jsonl"
    for found in RESULTS[:3]:
        append_result(path, found)
    whole = path.read_text()
    assert whole.count("\n") == 3
    path.write_text(whole[:-20] + end)
    assert read_results(path) == RESULTS[:2]
    append_result(path, RESULTS[2])
    append_result(path, RESULTS[3])
    assert read_results(path) == RESULTS[:4]


def test_a_last_line_without_its_end_is_read(tmp_path):
    path = tmp_path / "toy.jsonl"
    path.write_text(json.dumps(RESULTS[0]))
    assert read_results(path) == RESULTS[:1]
    append_result(path, RESULTS[1])
    assert read_results(path) == RESULTS[:2]


def test_of_a_run_that_is_there_twice_the_later_line_counts(tmp_path):
    for accuracy in (1.0, 2.0):
        append_result(tmp_path / "toy.jsonl", result("dense", 1, accuracy))
    assert read_results(tmp_path / "toy.jsonl") == [result("dense", 1, 2.0)]


def test_weights_that_runs_start_from_are_trained_once(tmp_path, monkeypatch):
    from benchmarks.study import runner

    ran = []
    monkeypatch.setattr(
        runner, "run_one", lambda setting, seed, places: ran.append(seed) or {"accuracy": 0.0}
    )
    study(monkeypatch, tmp_path, "run", "--only", "start/six-classes", "--seeds", "3", "1", "2")
    assert ran == [1]


def study(monkeypatch, results, *arguments):
    monkeypatch.setattr("sys.argv", ["study", "--results", str(results), *arguments])
    command.main()


def test_part_of_an_archive_is_unpacked_once(tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as images:
        for name in ("cat", "dog", "truck"):
            for number in range(3):
                images.writestr(f"train/{name}/{number}.jpg", f"{name}{number}")
            images.writestr(f"test/{name}/0.jpg", name)
    folder = unpack(archive, tmp_path / "work", ["cat", "dog"], 2)
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    assert found == [
        f"{split}/{name}/{number}.jpg"
        for split, numbers in (("test", [0]), ("train", [0, 1]), ("validation", [0]))
        for name in ("cat", "dog")
        for number in numbers
    ]
    assert (folder / "train/dog/1.jpg").read_text() == "dog1"
    archive.unlink()
    assert unpack(archive, tmp_path / "work", ["cat", "dog"], 2) == folder


def test_an_archive_with_too_few_images_is_refused(tmp_path):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as images:
        images.writestr("train/cat/0.jpg", "")
    with pytest.raises(ValueError, match="1 images in train/cat, 2 needed"):
        unpack(archive, tmp_path / "work", ["cat"], 2)


@pytest.mark.slow
def test_a_run_is_kept_and_its_saving_counted(tmp_path, monkeypatch):
    task = next(task for task in GRIDS["small"] if task.name == "digits")
    tiny = Task(
        name="tiny",
        about="",
        flags={**task.flags, "epochs": 1, "compile_backend": "aot_eager"},
        settings={"dense": {}, "constant-0.5": {"schedule": "constant:rate=0.5"}},
    )
    monkeypatch.setitem(GRIDS, "small", (tiny,))
    study(monkeypatch, tmp_path, "run", "--work", str(tmp_path / "work"), "--seeds", "1")
    dense, sparse = summarize(tiny, read_results(tmp_path / "small.jsonl"), 0.5)
    assert dense.cost == Cost(1.0, 1.0)
    # Half of the channels of every layer except the classifier.
    assert sparse.cost.arithmetic == pytest.approx(1 - 0.5 * 2 / 3, abs=0.01)
    assert dense.accuracy > 20
