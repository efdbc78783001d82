"""The page of a comparison: is a run faster, is it as accurate, what did it save?"""

import base64
import html
import math
from statistics import median

from ssprop_fx.training.compare.comparison import Comparison, Difference, RunData
from ssprop_fx.training.records.rows import step_times

__all__ = ["answers", "format_page", "format_text", "table"]

# Differences up to these count as equal: two percent of time, a tenth of a point of accuracy.
_SAME_TIME = 0.02
_SAME_POINTS = 0.1

_STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; color: #2e3440; background: #fff;
  max-width: 1120px; margin: 1.2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; margin: 0 0 .6rem; }
table { border-collapse: collapse; width: 100%; margin-bottom: .8rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #d8dee9;
  vertical-align: top; }
table.numbers td + td, table.numbers th + th { text-align: right; padding: .3rem 0 .3rem .7rem;
  font-variant-numeric: tabular-nums; }
img { width: 100%; }
p { color: #4c566a; font-size: .85rem; margin: .4rem 0; }
"""

_QUESTIONS = ("is it faster?", "is it as accurate?", "what did it save?")


def answers(difference: Difference, has_energy: bool) -> tuple[str, str, str]:
    """Return the answers to the three questions, one line each.

    Args:
        difference: how the run differs from the baseline.
        has_energy: whether both runs measured joules.
    """
    ratio, points = difference.time_ratio, difference.points
    faster = "about the same" if abs(ratio - 1) <= _SAME_TIME else "yes" if ratio < 1 else "no"
    accurate = "yes" if points >= -_SAME_POINTS else "no"
    saved = [
        _saved("seconds", difference.seconds_saved),
        _saved("joules", difference.joules_saved) if has_energy else "joules: not available",
        _saved("backward FLOPs", difference.backward_saved),
    ]
    return (
        f"{faster}: {ratio:.2f} of the baseline's time to {difference.target:.2f} %"
        f" ({difference.seconds_to_target:.0f} s, {difference.baseline_seconds_to_target:.0f} s)",
        f"{accurate}: {points:+.2f} points at the end",
        ", ".join(saved),
    )


def table(comparison: Comparison) -> list[list[str]]:
    """Return the runs' numbers: a row of headings, then a row for each run."""
    settings = comparison.differing_settings()
    counters = " + ".join(name.upper() for name in comparison.counters)
    heads = ["run", "top-1 at the end", "best top-1", "steps", "seconds", f"joules {counters}"]
    heads += ["dense ms/step", "sparse ms/step", "mean drop rate", *settings]
    return [[head.strip() for head in heads], *(_row(comparison, run) for run in comparison.runs)]


def format_text(comparison: Comparison) -> str:
    """Return the comparison as text for a terminal, without a final newline."""
    rows = table(comparison)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for name, lines_of_run in _all_answers(comparison):
        lines += ["", f"{name}, against {comparison.baseline.name}:"]
        pairs = zip(_QUESTIONS, lines_of_run, strict=True)
        lines += [f"  {question} {answer}" for question, answer in pairs]
    return "\n".join(lines)


def format_page(comparison: Comparison, picture: bytes) -> str:
    """Return the comparison as one HTML page that needs no other file.

    Args:
        comparison: the runs.
        picture: the PNG file of `draw_comparison`.
    """
    head, *rows = table(comparison)
    asked = ["run", *_QUESTIONS]
    answered = [[name, *lines] for name, lines in _all_answers(comparison)]
    encoded = base64.b64encode(picture).decode("ascii")
    verdict = _html_table(asked, answered) if answered else ""
    names = ", ".join(run.name for run in comparison.runs)
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(names)}</title>
<style>
{_STYLE}</style>
</head>
<body>
<h1>Against {html.escape(comparison.baseline.name)}</h1>
{verdict}
<img alt="Accuracy over steps, seconds and joules, and drop rate"
  src="data:image/png;base64,{encoded}">
{_html_table(head, rows, "numbers")}
<p>Seconds and joules cover training, including compiling and loading, but not validation.
"Is it faster?" compares the times to the highest accuracy that both runs reached at the end of an
epoch, so runs of different length can be compared. Each row is one run; other seeds give other
numbers.</p>
</body>
</html>
"""


def _all_answers(comparison: Comparison) -> list[tuple[str, tuple[str, str, str]]]:
    return [
        (run.name, answers(comparison.difference(run), bool(comparison.counters)))
        for run in comparison.runs
        if run is not comparison.baseline
    ]


def _row(comparison: Comparison, run: RunData) -> list[str]:
    joules = run.joules(comparison.counters)[-1]
    return [
        run.name,
        f"{run.top1[-1]:.2f} %",
        f"{max(run.top1):.2f} %",
        str(run.epochs[-1].step),
        f"{run.seconds[-1]:.1f}",
        "not available" if math.isnan(joules) else f"{joules:.0f}",
        _milliseconds(run, sparse=False),
        _milliseconds(run, sparse=True),
        f"{run.drop_rate:.2f}",
        *(str(run.config.get(name, "-")) for name in comparison.differing_settings()),
    ]


def _milliseconds(run: RunData, *, sparse: bool) -> str:
    times = step_times(run.steps, sparse=sparse)
    return f"{median(times):.1f}" if times else "-"


def _saved(what: str, fraction: float) -> str:
    if math.isnan(fraction):
        return f"{what}: unknown"
    if fraction < 0:
        return f"no {what}: {-fraction:.0%} more"
    return f"{fraction:.0%} of the {what}"


def _html_table(head: list[str], rows: list[list[str]], kind: str = "answers") -> str:
    cells = [("th", head), *(("td", row) for row in rows)]
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in cells
    ]
    return f'<table class="{kind}">\n' + "\n".join(lines) + "\n</table>"
