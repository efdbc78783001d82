"""The plot of a comparison: accuracy over steps, seconds and joules; drop rate and kept mass."""

import io
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ssprop_fx.training.compare.comparison import Comparison, RunData

__all__ = ["draw_comparison"]

_BASELINE = "#4c566a"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_comparison(comparison: Comparison) -> bytes:
    """Return the plot as the bytes of a PNG file.

    Args:
        comparison: the runs.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    (over_steps, over_seconds), (over_joules, rate) = figure.subplots(2, 2)
    others = [run for run in comparison.runs if run is not comparison.baseline]
    colors = {id(run): _COLORS[i % len(_COLORS)] for i, run in enumerate(others)}
    colors[id(comparison.baseline)] = _BASELINE

    def draw_accuracy(axes: Axes, label: str, places: Callable[[RunData], list[float]]) -> None:
        for run in comparison.runs:
            width = 2.4 if run is comparison.baseline else 1.6
            axes.plot(
                places(run),
                run.top1,
                color=colors[id(run)],
                linewidth=width,
                marker="o",
                markersize=3,
                label=run.name,
            )
        axes.set_title(f"Validation accuracy over {label}", loc="left", fontsize=10)
        axes.set_ylabel("top-1 (%)")
        axes.set_xlabel(label)

    draw_accuracy(over_steps, "steps", lambda run: [float(row.step) for row in run.epochs])
    draw_accuracy(over_seconds, "seconds of training", lambda run: run.seconds)
    if comparison.counters:
        names = " + ".join(name.upper() for name in comparison.counters)
        draw_accuracy(over_joules, f"joules ({names})", lambda run: run.joules(comparison.counters))
    else:
        over_joules.set_title("Validation accuracy over joules", loc="left", fontsize=10)
        over_joules.text(0.5, 0.5, "energy: not available", ha="center", va="center")
        over_joules.set_axis_off()
    for run in comparison.runs:
        steps, rates = [row.step for row in run.steps], [row.drop_rate for row in run.steps]
        rate.step(steps, rates, where="post", color=colors[id(run)], linewidth=1.2)
        masses = [row.kept_mass for row in run.steps]
        rate.plot(steps, masses, color=colors[id(run)], linewidth=1, linestyle=":")
    rate.set_title(
        "Drop rate: fraction of channels left out; kept mass of the gradient (dotted)",
        loc="left",
        fontsize=10,
    )
    rate.set_xlabel("steps")
    rate.set_ylim(-0.02, 1.02)
    for axes in (over_steps, over_seconds, over_joules, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    over_steps.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
