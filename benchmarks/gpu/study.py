"""Stages of `python -m benchmarks gpu-study`: one seed each, with all rows.

    dense          the whole training, and trainings that stop earlier
    RULES          the same epochs, with backwards of some samples

A run costs its time. A row gains if it is more accurate than dense training of the same time.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.gpu.cifar import Images, digits, load
from benchmarks.gpu.learner import Learner, Recipe
from benchmarks.gpu.settings import Settings, Stage
from benchmarks.results import read, table
from benchmarks.study.cost import dense_accuracy
from ssprop_fx import AddedNoise, KeptMass, SparsityScheduler

__all__ = ["EPOCHS", "RULES", "SEEDS", "RunRow", "Summary", "summaries", "summary_table"]

# The first is the whole training; rules train as long.
EPOCHS = (20, 15, 12, 10)
# Name of a row -> what makes its scheduler; each is compiled with `SparsityConfig(axis="sample")`.
RULES: Mapping[str, Callable[[], SparsityScheduler]] = {
    "noise 0.1": lambda: SparsityScheduler(controller=AddedNoise(0.1)),
    "mass 0.9": lambda: SparsityScheduler(controller=KeptMass(0.9)),
}
_FORMATS = {
    "row": "",
    "seeds": "d",
    "accuracy": ".2f",
    "deviation": ".2f",
    "seconds": ".1f",
    "kept": ".2f",
    "cost": ".1f",
    "gain": "+.2f",
}


@dataclass(frozen=True)
class RunRow:
    """One run.

    Attributes:
        row: name of the row.
        epochs: its epochs.
        seed: its seed.
        accuracy: share of the test images that are classified correctly, in percent.
        seconds: time of the training, without compile and test.
        kept: mean share of the samples that the backwards kept.
    """

    row: str
    epochs: int
    seed: int
    accuracy: float
    seconds: float
    kept: float


@dataclass(frozen=True)
class Summary:
    """One row, over its seeds.

    Attributes:
        row: its name.
        seeds: number of runs.
        accuracy, deviation: mean and standard deviation of the accuracies; 0 for a single run.
        seconds: mean time.
        kept: mean share of the samples kept.
        cost: time in epochs of the whole dense training.
        gain: accuracy minus that of dense training of the same time, in points; NaN outside of the
            dense rows' times.
    """

    row: str
    seeds: int
    accuracy: float
    deviation: float
    seconds: float
    kept: float
    cost: float
    gain: float


def summaries(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """Return a summary for each row, in order.

    Seeds that lack a row do not count, unless all do.

    Args:
        rows: records of RunRow.
    """
    names = dict.fromkeys(row["row"] for row in rows)
    by_seed = {
        seed: [row for row in rows if row["seed"] == seed] for seed in {r["seed"] for r in rows}
    }
    whole = [row for found in by_seed.values() if len(found) == len(names) for row in found]
    runs = {name: [row for row in whole or rows if row["row"] == name] for name in names}
    seconds = {name: fmean(row["seconds"] for row in found) for name, found in runs.items()}
    accuracy = {name: fmean(row["accuracy"] for row in found) for name, found in runs.items()}
    epochs = {name: found[0]["epochs"] for name, found in runs.items()}
    dense = [name for name in names if name.startswith("dense")]
    curve = [(seconds[name], accuracy[name]) for name in dense]
    # The longest dense run says what an epoch takes.
    longest = max(dense, key=lambda name: epochs[name], default=None)
    epoch_s = seconds[longest] / epochs[longest] if longest else float("nan")
    made = []
    for name, found in runs.items():
        equal = dense_accuracy(curve, seconds[name])
        values = [row["accuracy"] for row in found]
        made.append(
            Summary(
                name,
                len(found),
                accuracy[name],
                stdev(values) if len(values) > 1 else 0.0,
                seconds[name],
                fmean(row["kept"] for row in found),
                seconds[name] / epoch_s,
                float("nan") if equal is None else accuracy[name] - equal,
            )
        )
    return made


@dataclass(frozen=True)
class SeedStage:
    """A stage: trains all rows with one seed.

    Attributes:
        seed: the seed.
    """

    seed: int

    def __call__(self, settings: Settings, name: str) -> None:
        """Run the stage; save after each run.

        Raises:
            RuntimeError: a row failed; the others are saved.
        """
        # Keep counts that follow the gradients are many shapes, and each would be tried out anew.
        torch.backends.cudnn.benchmark = False
        images = _images(settings)
        recipe = Recipe()
        if settings.is_tiny:
            recipe = replace(recipe, batch_size=64, lr=0.1, backend="aot_eager")
        rows: list[RunRow] = []
        failed = []

        def train(learner: Learner, row: str, epochs: int) -> None:
            trained = learner.train(max(epochs // 10, 1) if settings.is_tiny else epochs, self.seed)
            rows.append(RunRow(row, epochs, self.seed, **vars(trained)))
            settings.save(rows, name)
            print(f"{row}: {trained}", flush=True)

        dense = Learner(images, recipe, settings.is_tiny, None)
        for epochs in EPOCHS:
            train(dense, f"dense {epochs}", epochs)
        for rule, scheduler in RULES.items():
            try:
                learner = Learner(images, recipe, settings.is_tiny, scheduler())
                train(learner, rule, EPOCHS[0])
            except Exception:
                traceback.print_exc()
                failed.append(rule)
        if failed:
            raise RuntimeError(f"failed: {', '.join(failed)}")


def summary_table(folder: Path) -> str:
    """Return the summaries of all seeds in a folder as text."""
    rows = [row for path in sorted(folder.glob("gpu-seed*.json")) for row in read(path)]
    return table(summaries(rows), _FORMATS)


def _images(settings: Settings) -> Images:
    if settings.is_tiny:
        return digits().to(settings.device)
    if settings.data is None:
        raise ValueError("the study needs --data, a file of `python -m benchmarks gpu-pack`")
    return load(settings.data).to(settings.device)


SEEDS = tuple(Stage(f"seed{seed}", 200, SeedStage(seed)) for seed in (1, 2, 3))
