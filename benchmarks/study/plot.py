"""`python -m benchmarks.study plot`: accuracy over time, with dense training as a line."""

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
_COLUMNS = 3
# More labels would be unreadable; the tables show the other settings.
_SHOWN = {
    "steps-0.8": ("#d08770", "o"),
    "constant-0.3": ("#ebcb8b", "P"),
    "early-0.8": ("#2e7d6b", "^"),
    "late-0.8": ("#a3be8c", "v"),
    "weight-0.8": ("#5e81ac", "s"),
    "steps-0.8-random": ("#b48ead", "x"),
    "samples-0.3": ("#bf616a", "*"),
    "narrow": ("#8f6f56", "D"),
}


def draw(tasks: Sequence[Task], results: Sequence[Result], path: Path) -> None:
    """Plot accuracy over time, one panel per task.

    Args:
        tasks: tasks of the grid.
        results: results of their runs.
        path: the PNG file; an existing file is replaced.
    """
    per_saving = time_per_saving()
    rows = {task.name: summarize(task, results, per_saving) for task in tasks}
    # A task with only dense rows has nothing to compare.
    shown = {name: found for name, found in rows.items() if not all(row.is_dense for row in found)}
    columns = min(len(shown), _COLUMNS)
    lines = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, (name, found) in zip(panels.flat, shown.items(), strict=False):
        _draw_panel(axes, found)
        axes.set_xlabel("time, whole dense training = 1", fontsize=8)
        axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy (%)")
    handles = {
        label: handle
        for axes in panels.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2 * columns,
        frameon=False,
        fontsize=8,
    )
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=130))


def _draw_panel(axes: Axes, rows: Sequence[Row]) -> None:
    whole = next(row.cost.time for row in rows if row.name == "dense")
    dense = sorted((row for row in rows if row.is_dense), key=lambda row: row.cost.time)
    axes.errorbar(
        [row.cost.time / whole for row in dense],
        [row.accuracy for row in dense],
        yerr=[row.deviation or 0 for row in dense],
        color=_DENSE,
        marker=".",
        label="dense, fewer epochs",
    )
    for row in rows:
        if row.name in _SHOWN:
            color, marker = _SHOWN[row.name]
            axes.errorbar(
                row.cost.time / whole,
                row.accuracy,
                yerr=row.deviation or 0,
                color=color,
                marker=marker,
                linestyle="none",
                label=row.name,
            )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
