"""Plots of results as PNG files, with matplotlib, which is optional."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.variants import DENSE, PEERS

__all__ = ["Record", "draw_layers", "draw_scaling", "draw_steps", "figure_maybe", "sparse_rows"]

_SPARSE, _BOUND, _DENSE = "#d08770", "#2e7d6b", "#4c566a"
_PEERS = dict(zip(PEERS, ("#d8dee9", "#c9d3c0", "#b8c2d4", "#8fa1bf"), strict=True))
_PARTS = {
    "reduced_ms": ("reduced operation", "#d08770"),
    "score_ms": ("score", "#a3be8c"),
    "select_ms": ("select", "#b48ead"),
    "gather_ms": ("gather", "#5e81ac"),
    "scatter_ms": ("scatter", "#ebcb8b"),
}

Record = Mapping[str, Any]


def sparse_rows(rows: Sequence[Record]) -> list[Record]:
    """Return the rows of this package's sparse steps."""
    others = (DENSE, *PEERS)
    return [row for row in rows if row["variant"] not in others and row["drop_rate"] > 0]


def draw_steps(rows: Sequence[Record], path: Path) -> None:
    """Plot the speed-up of every row over dense torch.compile, grouped by model.

    Args:
        rows: records of StepRow, of one or more models.
        path: the PNG file; an existing file is replaced.
    """
    models = dict.fromkeys(row["model"] for row in rows)
    drawn = [row for row in rows if row["variant"] != DENSE]
    made = _figure(0.9 + 0.3 * len(drawn) + 0.5 * len(models))
    if made is None:
        return
    figure, axes = made
    labels, y = [], 0.0
    for model in models:
        axes.text(0, y, model, fontsize=9, fontweight="bold", va="center")
        y += 1
        for row in drawn:
            if row["model"] != model:
                continue
            color = _PEERS.get(row["variant"], _SPARSE if row["drop_rate"] else _DENSE)
            axes.barh(y, row["speedup"], color=color, height=0.8)
            axes.text(row["speedup"], y, f" {row['speedup']:.2f}", fontsize=8, va="center")
            if row in sparse_rows(rows):
                axes.plot([row["bound"]] * 2, [y - 0.4, y + 0.4], color=_BOUND, linewidth=2)
            rate = f", drop {row['drop_rate']:g}" if row["drop_rate"] else ""
            labels.append((y, row["variant"] + rate))
            y += 1
        y += 0.4
    axes.axvline(1, color=_DENSE, linewidth=1)
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=8)
    axes.set_ylim(y, -0.8)
    axes.set_title(
        "Speed of a training step, dense torch.compile = 1; green: bound", loc="left", fontsize=10
    )
    _save(figure, axes, path)


def draw_scaling(rows: Sequence[Record], path: Path) -> None:
    """Plot speed-up over drop rate, a line for each batch size, resolution and variant.

    Args:
        rows: records of StepRow.
        path: the PNG file; an existing file is replaced.
    """
    made = _figure(5)
    if made is None:
        return
    figure, axes = made
    rows = [row for row in rows if row["variant"] not in (DENSE, *PEERS)]
    for model, variant in dict.fromkeys((row["model"], row["variant"]) for row in rows):
        line = [row for row in rows if (row["model"], row["variant"]) == (model, variant)]
        rates = [row["drop_rate"] for row in line]
        label = f"{model}, {variant}"
        (drawn,) = axes.plot(rates, [row["speedup"] for row in line], marker="o", label=label)
        bounds = [row["bound"] for row in line]
        axes.plot(rates, bounds, color=drawn.get_color(), linestyle=":", linewidth=1)
    axes.axhline(1, color=_DENSE, linewidth=1)
    axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("drop rate")
    axes.set_title(
        "Speed of a training step, dense torch.compile = 1; dotted: bound", loc="left", fontsize=10
    )
    _save(figure, axes, path)


def draw_layers(rows: Sequence[Record], path: Path) -> None:
    """Plot the parts of each layer's sparse backward as shares of the dense backward.

    Args:
        rows: records of LayerRow.
        path: the PNG file; an existing file is replaced.
    """
    made = _figure(1.2 + 0.3 * len(rows))
    if made is None:
        return
    figure, axes = made
    for y, row in enumerate(rows):
        left = 0.0
        for field, (label, color) in _PARTS.items():
            width = row[field] / row["dense_ms"]
            axes.barh(y, width, left=left, color=color, height=0.8, label=None if y else label)
            left += width
        whole, ideal = row["sparse_ms"] / row["dense_ms"], 1 / row["ideal_gain"]
        for x, color, label in ((whole, "black", "whole, compiled"), (ideal, _BOUND, "ideal")):
            axes.plot([x, x], [y - 0.4, y + 0.4], color=color, label=None if y else label)
    axes.axvline(1, color=_DENSE, linewidth=1)
    labels = [f"{row['layer']} {row['shape']}, drop {row['drop_rate']:g}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("Time of a layer's sparse backward, dense = 1", loc="left", fontsize=10)
    _save(figure, axes, path)


def figure_maybe(width: float, height: float) -> Any:
    """Return an empty figure, its size in inches; without matplotlib, print a note, return None."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is missing: pip install '.[train]'")
        return None
    # Not pyplot: a separate figure has no global state and needs no display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _figure(height: float) -> tuple[Any, Any] | None:
    """Return a figure with one pair of axes, None without matplotlib."""
    figure = figure_maybe(9, height)
    return None if figure is None else (figure, figure.subplots())


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    figure.savefig(path, format="png", dpi=150)
