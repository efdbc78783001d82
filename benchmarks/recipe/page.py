"""`python -m benchmarks.recipe page`: docs/study.md, from the results.

In the text, `[[TASK ROW FIELD]]` stands for a field of that row's `Summary`.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.recipe.summary import Summary, summarize
from benchmarks.recipe.task import TASKS, Task
from benchmarks.study.store import Result

__all__ = ["claims", "page"]

# The default rule, and the tasks that the README names.
RECIPE = "noise-0.1"
FINE_TUNING = {
    "flowers": "EfficientNet-Lite0 on 1,600 photographs of flowers",
    "cifar-fine": "EfficientNet-Lite0 on 5,000 images of CIFAR-10",
}

_TEXT = Path(__file__).with_name("page.md")
_FIELD = re.compile(r"\[\[(\S+) (\S+) (\w+)\]\]")
_FORMS = {"accuracy": ".1f", "time": ".2f", "loss": ".3f", "seconds": ".0f", "ece": ".1f"}
_COLUMNS = (
    *("row", "seeds", "accuracy", "test loss", "calibration error", "time", "kept, by quarter"),
    *("against the whole dense run", "against dense of equal time"),
)


def page(results: Sequence[Result]) -> str:
    """Return the page as Markdown."""
    found = [(task, summarize(task, results)) for task in TASKS.values()]
    shown = [(task, rows) for task, rows in found if rows]
    abouts = {
        row.name: row.about for _, rows in shown for row in rows if not row.name.startswith("dense")
    }
    machines = {(r["device"], r["threads"], r["torch"], r["commit"]): None for r in results}
    by_name = {task.name: {row.name: row for row in rows} for task, rows in shown}

    def field(match: re.Match[str]) -> str:
        task, row, name = match.groups()
        if row not in by_name.get(task, {}):
            return "(not run)"
        return format(getattr(by_name[task][row], name), _FORMS.get(name, ""))

    return _FIELD.sub(field, _TEXT.read_text(encoding="utf-8")).format(
        rows="\n".join(f"- `{name}`: {about}" for name, about in abouts.items()),
        tables="\n\n".join(_table(task, rows) for task, rows in shown),
        machines="\n".join(
            f"- {device}, {threads} thread, torch {torch}, commit {commit}"
            for device, threads, torch, commit in machines
        ),
    )


def claims(results: Sequence[Result]) -> list[str]:
    """Return what the README says of the default rule, a text for each task."""
    lines = []
    for name, what in FINE_TUNING.items():
        rows = {row.name: row for row in summarize(TASKS[name], results)}
        if RECIPE not in rows:
            continue
        dense, found = rows["dense"], rows[RECIPE]
        assert found.to_equal is not None
        lines.append(
            f"{what}: {found.time:.2f} of the time, test accuracy {found.accuracy:.1f} % against"
            f" {dense.accuracy:.1f} %; dense training of equal time reaches"
            f" {found.accuracy - found.to_equal.mean:.1f} % ({found.seeds} seeds)"
        )
    return lines


def _table(task: Task, rows: Sequence[Summary]) -> str:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *(_cells(row) for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    about = f"{task.about[0].upper()}{task.about[1:]}"
    return f"### {task.name}\n\n{about}; {task.epochs} epochs.\n\n{table}"


def _cells(row: Summary) -> tuple[str, ...]:
    return (
        row.name,
        str(row.seeds),
        f"{row.accuracy:.2f}",
        f"{row.loss:.3f}",
        f"{row.ece:.1f}",
        f"{row.time:.2f}",
        " ".join(f"{share:.2f}".removeprefix("0") for share in row.shares),
        "" if row.to_full is None else str(row.to_full),
        "" if row.to_equal is None else str(row.to_equal),
    )
