"""`python -m benchmarks.study plot`: accuracy over cost, dense training as a line."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.study.cost import time_per_saving
from benchmarks.study.summary import Result, Row, summarize
from benchmarks.study.task import Task
from ssprop_fx.training.files import replace_file

__all__ = ["draw"]

_DENSE = "#4c566a"
# The others have their place in the tables; more labels cannot be read.
_SHOWN = {
    "steps-0.8": ("#d08770", "o"),
    "constant-0.3": ("#ebcb8b", "P"),
    "early-0.8": ("#2e7d6b", "^"),
    "late-0.8": ("#a3be8c", "v"),
    "weight-0.8": ("#5e81ac", "s"),
    "steps-0.8-random": ("#b48ead", "x"),
    "narrow": ("#8f6f56", "D"),
}


def draw(tasks: Sequence[Task], results: Sequence[Result], path: Path) -> None:
    """Draw one panel a task for arithmetic, and below it one for time.

    Args:
        tasks: of the grid.
        results: of their runs.
        path: the PNG file; one that exists is replaced.
    """
    per_saving = time_per_saving()
    rows = {task.name: summarize(task, results, per_saving) for task in tasks}
    shown = {name: found for name, found in rows.items() if found}
    figure = Figure(figsize=(3.2 * len(shown), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(shown), sharey="col", squeeze=False)
    for column, (name, found) in enumerate(shown.items()):
        whole = next(row.cost.arithmetic for row in found if row.name == "dense")
        for line, kind in enumerate(("arithmetic", "time")):
            axes = panels[line][column]
            _draw_panel(axes, found, whole, kind)
            axes.set_xlabel(f"{kind}, dense = 1")
        panels[0][column].set_title(name, loc="left", fontsize=10, fontweight="bold")
    for line in (0, 1):
        panels[line][0].set_ylabel("test accuracy (%)")
    handles = {
        label: handle
        for axes in panels[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2 * len(shown),
        frameon=False,
    )
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _draw_panel(axes: Axes, rows: Sequence[Row], whole: float, kind: str) -> None:
    dense = sorted(
        ((getattr(row.cost, kind), row) for row in rows if row.is_dense), key=lambda point: point[0]
    )
    axes.errorbar(
        [x / whole for x, _ in dense],
        [row.accuracy for _, row in dense],
        yerr=[row.deviation or 0 for _, row in dense],
        color=_DENSE,
        marker=".",
        label="dense, fewer epochs",
    )
    for row in rows:
        if row.name in _SHOWN:
            color, marker = _SHOWN[row.name]
            axes.errorbar(
                getattr(row.cost, kind) / whole,
                row.accuracy,
                yerr=row.deviation or 0,
                color=color,
                marker=marker,
                linestyle="none",
                label=row.name,
            )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
