"""The study of the recipe: who trains on what, what is compared with what, and the page."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.recipe import page as pages
from benchmarks.recipe.images import Images, load_images
from benchmarks.recipe.learner import evaluate
from benchmarks.recipe.page import page
from benchmarks.recipe.plot import draw
from benchmarks.recipe.rows import rows_of
from benchmarks.recipe.runner import run_task
from benchmarks.recipe.sampling import Order
from benchmarks.recipe.summary import summarize
from benchmarks.recipe.task import TASKS, Task
from benchmarks.study.store import read_results

TASK = Task(
    name="tiny",
    about="coloured squares",
    model="study_resnet",
    model_kwargs={"width": 8},
    data="none",
    size=32,
    classes=4,
    epochs=2,
    lr=0.1,
    batch_size=16,
    fewer=(1,),
    backend="aot_eager",
)


def squares(count: int, seed: int) -> Images:
    """Images of one colour in each class, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    noise = torch.randint(0, 100, (count, 3, 36, 36), generator=generator, dtype=torch.uint8)
    noise[torch.arange(count), labels.clamp(max=2)] += 100
    return Images(noise, labels)


def test_a_study_runs_goes_on_and_prints_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    names = ["dense-1ep", "noise-0.3", "infobatch", "mass-0.9-stale"]
    train, test = squares(160, 0), squares(40, 1)
    run_task(TASK, train, test, path, names=names[:2], seeds=[0])
    before = path.read_text()
    assert [r["setting"] for r in read_results(path)] == ["dense", "dense-1ep", "noise-0.3"]
    run_task(TASK, train, test, path, names=names, seeds=[0, 1])
    assert path.read_text().startswith(before)
    results = read_results(path)
    assert {(r["setting"], r["seed"]) for r in results} == {
        (name, seed) for name in ["dense", *names] for seed in (0, 1)
    }
    rows = {row.name: row for row in summarize(TASK, results)}
    assert all(row.seeds == 2 for row in rows.values())
    assert rows["dense"].accuracy > 40
    assert rows["dense"].shares == (1, 1, 1, 1)
    assert rows["noise-0.3"].shares[0] < 1
    # A last epoch knows the scores of the one before, and leaves samples out of the forward.
    assert rows["mass-0.9-stale"].shares[3] < 1
    monkeypatch.setitem(TASKS, "tiny", TASK)
    assert "| noise-0.3 | 2 |" in page(results)
    draw(results, ["tiny"], "noise-0.3", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_rows_share_their_order_and_infobatch_leaves_out_samples_of_low_loss() -> None:
    rows = rows_of(TASK)
    orders = [Order(rows[name], 64, 16, 4, seed=3) for name in ("dense", "infobatch")]
    assert torch.equal(*(order.next()[0] for order in orders))
    losses = torch.cat([torch.zeros(40), torch.ones(24)])
    seen: list[set[int]] = []
    for order in orders:
        order._queue = []
        order.tell(torch.arange(64), losses, losses)
        batches = order._fill()
        seen.append({int(i) for indices, _ in batches for i in indices})
    assert seen[0] == set(range(64))
    # Only whole batches; half of those with a low loss count twice.
    assert 24 <= len(seen[1]) < 60
    factors = torch.cat([factors for _, factors in batches if factors is not None])
    indices = torch.cat([indices for indices, _ in batches])
    assert torch.equal(factors, torch.where(indices < 40, 2.0, 1.0))


def test_samples_left_out_of_the_forward_are_unbiased() -> None:
    order = Order(rows_of(TASK)["mass-0.9-stale"], 16, 16, 4, seed=0)
    norms = torch.linspace(0.2, 1, 16)
    order.tell(torch.arange(16), norms, norms)
    total = torch.zeros(16)
    for _ in range(3000):
        indices, factors = order._sure_left_out(torch.arange(16))
        assert len(indices) < 16
        total[indices] += factors
    assert (total / 3000 - 1).abs().max() < 0.3


def test_gains_are_paired_and_interpolated() -> None:
    def result(row: str, seed: int, accuracy: float, relative: float) -> dict:
        numbers = {"accuracy": accuracy, "relative": relative, "loss": 1.0, "ece": 2.0}
        rest = {"seconds": 10.0, "shares": [1, 1, 1, 1], "task": "tiny", "setting": row}
        return {**numbers, **rest, "seed": seed}

    results = [
        *(result("dense", seed, 80.0 + seed, 1.0) for seed in (0, 1, 2)),
        *(result("dense-1ep", seed, 70.0 + seed, 0.5) for seed in (0, 1, 2)),
        *(result("mass-0.9", seed, 79.0 + seed + (seed == 2), 0.75) for seed in (0, 1, 2)),
    ]
    rows = {row.name: row for row in summarize(TASK, results)}
    found = rows["mass-0.9"]
    assert found.to_full is not None
    assert found.to_full.mean == pytest.approx(-2 / 3)
    assert found.to_full.error == pytest.approx(1 / 3)
    assert found.to_equal is not None
    assert found.to_equal.mean == pytest.approx(4 + 1 / 3)
    assert rows["dense"].to_equal is None


def test_calibration_error_of_a_model_that_is_too_sure() -> None:
    model = nn.Identity()
    logits = torch.tensor([[20.0, 0.0], [20.0, 0.0], [20.0, 0.0], [20.0, 0.0]])
    found = evaluate(model, iter([(logits, torch.tensor([0, 0, 0, 1]))]))
    assert found["accuracy"] == 75
    assert found["ece"] == pytest.approx(25, abs=1e-3)


def test_crops_stay_inside_and_repeat(tmp_path: Path) -> None:
    images = squares(8, 0)
    crops = [
        images.crops(torch.arange(8), 32, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert crops[0].shape == (8, 3, 32, 32)
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    assert crops[0].abs().max() <= 1


def test_the_page_is_short_and_up_to_date() -> None:
    text = page(read_results(Path(pages.__file__).with_name("results.jsonl")))
    assert text == (Path(__file__).parents[2] / "docs" / "study.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150


def test_the_readme_says_what_was_measured() -> None:
    results = read_results(Path(pages.__file__).with_name("results.jsonl"))
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text("utf-8").split())
    found = pages.claims(results)
    assert found
    for text in found:
        assert text in readme, "python -m benchmarks.recipe claims"


def test_folders_of_images_are_read_once(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "data" / "train" / name / "0.png")
    folder, cache = tmp_path / "data" / "train", tmp_path / "cache"
    images = load_images(folder, 20, cache)
    assert images.pixels.shape == (2, 3, 23, 23)
    (folder / "a" / "0.png").unlink()
    assert torch.equal(load_images(folder, 20, cache).pixels, images.pixels)
    assert json.dumps(images.labels.tolist()) == "[0, 1]"
