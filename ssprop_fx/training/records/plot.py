"""The plot of a run: accuracy, drop rate and time over its steps."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ssprop_fx.training.files import replace_file
from ssprop_fx.training.records.logs import Records
from ssprop_fx.training.records.rows import StepRow, median_ms

__all__ = ["plot_run"]

_DENSE, _SPARSE, _ACCURACY = "#4c566a", "#d08770", "#2e7d6b"


def plot_run(records: Records, path: Path, title: str) -> None:
    """Plot a run into a PNG file.

    Args:
        records: rows of the run; at least one step.
        path: the file; an existing file is replaced.
        title: title of the plot.

    Raises:
        OSError: the file cannot be written.
    """
    # Not pyplot: a separate figure has no global state and needs no display.
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, rate, time = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 2.4))
    figure.suptitle(title, fontsize=12, fontweight="bold")

    accuracy.plot(
        [row.step for row in records.epochs],
        [row.eval_top1 for row in records.epochs],
        color=_ACCURACY,
        marker="o",
        markersize=4,
    )
    accuracy.set_title("Validation accuracy", loc="left", fontsize=10)
    accuracy.set_ylabel("top-1 (%)")

    steps = [row.step for row in records.steps]
    rates = [row.drop_rate for row in records.steps]
    rate.step(steps, rates, where="post", color=_SPARSE)
    rate.fill_between(steps, rates, step="post", color=_SPARSE, alpha=0.25)
    masses = [row.kept_mass for row in records.steps]
    rate.plot(steps, masses, color=_DENSE, linewidth=1, linestyle=":")
    rate.set_title(
        "Drop rate: fraction of channels left out of the backward pass; kept mass of the gradient"
        " (dotted)",
        loc="left",
        fontsize=10,
    )
    rate.set_ylabel("fraction")
    rate.set_ylim(0, 1.02)

    timed = [row for row in records.steps if row.timed]
    for name, color, sparse in (("dense", _DENSE, False), ("sparse", _SPARSE, True)):
        rows = [row for row in timed if (row.drop_rate > 0) == sparse]
        if rows:
            _draw_times(time, rows, name, color, median_ms(rows, sparse=sparse))
    if timed:
        time.legend(frameon=False, fontsize=9)
        # A few slow steps must not flatten the rest.
        typical = sorted(row.ms for row in timed)[int(0.98 * (len(timed) - 1))]
        time.set_ylim(0, 1.25 * typical)
    time.set_title("Time of a training step, without compiling steps", loc="left", fontsize=10)
    time.set_ylabel("milliseconds")
    time.set_xlabel("step")
    time.xaxis.set_major_locator(MaxNLocator(integer=True))

    for axes in (accuracy, rate, time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _draw_times(axes: Axes, rows: list[StepRow], name: str, color: str, middle: float) -> None:
    axes.plot(
        [row.step for row in rows],
        [row.ms for row in rows],
        linestyle="none",
        marker=".",
        markersize=3,
        alpha=0.6,
        color=color,
        label=f"{name}, median {middle:.1f} ms",
    )
    axes.axhline(middle, color=color, linewidth=1)
