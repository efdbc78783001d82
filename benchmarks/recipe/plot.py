"""`python -m benchmarks.recipe plot`: accuracy over seconds."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.study.store import Result

__all__ = ["draw"]

_DENSE, _RULE = "#4c566a", "#2e7d6b"


def draw(results: Sequence[Result], tasks: Sequence[str], rule: str, path: Path) -> None:
    """Plot the dense runs and one rule of some tasks, side by side, into a PNG file.

    Args:
        results: results of their runs.
        tasks: names of the tasks.
        rule: name of the rule's row.
        path: the file.
    """
    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        runs = [r for r in results if r["task"] == task]
        names = sorted({r["setting"] for r in runs if r["setting"].startswith("dense")})
        for name in names:
            label = "dense" if name == "dense" else None
            _draw_row(axes, [r for r in runs if r["setting"] == name], _DENSE, label)
        _draw_row(axes, [r for r in runs if r["setting"] == rule], _RULE, f"samples by {rule}")
        axes.set_title(task, loc="left", fontsize=10)
        axes.set_xlabel("seconds of training, one thread")
        axes.set_ylabel("test accuracy (%)")
        axes.legend(frameon=False, fontsize=9, loc="lower right")
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _draw_row(axes: Axes, runs: Sequence[Result], color: str, label: str | None) -> None:
    """Draw the mean after each epoch, and the end with two standard errors."""
    if not runs:
        return
    points = list(zip(*(r["curve"] for r in runs), strict=True))
    seconds = [fmean(point["seconds"] for point in at) for at in points]
    accuracy = [fmean(point["accuracy"] for point in at) for at in points]
    axes.plot(seconds, accuracy, color=color, linewidth=1, alpha=0.5)
    ends = [r["accuracy"] for r in runs]
    error = 2 * stdev(ends) / len(ends) ** 0.5 if len(ends) > 1 else 0.0
    end = seconds[-1:], accuracy[-1:]
    axes.errorbar(*end, yerr=error, color=color, marker="o", capsize=3, label=label)
