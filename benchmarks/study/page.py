"""`python -m benchmarks.study table`: the page of the study, from its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.cost import time_per_saving
from benchmarks.study.store import Result
from benchmarks.study.summary import Row, summarize
from benchmarks.study.task import Task

__all__ = ["page", "verdict"]

_TEXT = Path(__file__).with_name("page.md")
_WORDS = ("better", "equal", "worse")
_COLUMNS = (
    "setting",
    "what differs",
    "seeds",
    "accuracy",
    "arithmetic",
    "against dense of equal arithmetic",
    "time",
    "against dense of equal time",
)


def page(tasks: Sequence[Task], results: Sequence[Result]) -> str:
    """Return the page as Markdown.

    Args:
        tasks: tasks of the grid.
        results: results of their runs.
    """
    per_saving = time_per_saving()
    rows = {task.name: summarize(task, results, per_saving) for task in tasks}
    shown = [task for task in tasks if rows[task.name]]
    return _TEXT.read_text(encoding="utf-8").format(
        per_saving=f"{per_saving:.2f}",
        headline=_headline([row for task in shown for row in rows[task.name]]),
        verdicts="\n".join(_verdicts(task, rows[task.name]) for task in shown),
        tables="\n\n".join(
            f"### {task.name}\n\n{task.about}\n\n{_table(task, rows[task.name])}" for task in shown
        ),
        missing="\n".join(_missing(tasks, rows)) or "Nothing.",
        machines="\n".join(_machines(results)),
    )


def verdict(gain: float | None, error: float | None) -> str:
    """Return "better" or "worse", or "equal" for a gain within two standard errors.

    Args:
        gain: gain in points; None if there is nothing to compare with.
        error: its standard error; None if unknown.

    Returns:
        The verdict; "" if the gain or its error is None.
    """
    if gain is None or error is None:
        return ""
    return "equal" if abs(gain) <= 2 * error else "better" if gain > 0 else "worse"


def _judge(rows: Sequence[Row]) -> dict[str, dict[str, list[str]]]:
    """Return kind of cost -> verdict -> names of settings."""
    # A setting with one seed appears only in the table.
    compared = [row for row in rows if not row.is_dense and row.seeds > 1]
    found: dict[str, dict[str, list[str]]] = {}
    for row in compared:
        for kind, gain in (("arithmetic", row.gain), ("time", row.gain_in_time)):
            word = verdict(gain, row.error)
            found.setdefault(kind, {}).setdefault(word, []).append(row.name)
    return found


def _headline(rows: Sequence[Row]) -> str:
    texts = []
    for kind, names in _judge(rows).items():
        counts = {word: len(names.get(word, [])) for word in _WORDS}
        texts.append(
            f"at equal {kind} {counts['better']} of {sum(counts.values())} rows are better than"
            f" dense training, {counts['equal']} equal and {counts['worse']} worse"
        )
    return "; ".join(texts) or "no row has two seeds yet"


def _verdicts(task: Task, rows: Sequence[Row]) -> str:
    lines = [f"- **{task.name}**"]
    for kind, names in _judge(rows).items():
        texts = [f"{word}: `{'`, `'.join(names[word])}`" for word in _WORDS if word in names]
        if texts:
            lines.append(f"  - at equal {kind}: {'; '.join(texts)}")
    return "\n".join(lines) if len(lines) > 1 else f"{lines[0]}: only dense rows have two seeds"


def _missing(tasks: Sequence[Task], rows: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = []
    for task in tasks:
        found = {row.name for row in rows[task.name]}
        missing = [name for name in task.settings if name not in found]
        if missing and task.name != "start":
            names = f": `{'`, `'.join(missing)}`" if found else f", all of it. {task.about}"
            lines.append(f"- **{task.name}**{names}")
    return lines


def _table(task: Task, rows: Sequence[Row]) -> str:
    whole = next(row.cost.arithmetic for row in rows if row.name == "dense")
    lines = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for row in rows:
        spread = "" if row.deviation is None else f" ± {row.deviation:.2f}"
        lines.append(
            (
                row.name,
                _flags(task.settings[row.name]),
                str(row.seeds),
                f"{row.accuracy:.2f}{spread}",
                f"{row.cost.arithmetic / whole:.2f}",
                _gain(row.gain, row.error),
                f"{row.cost.time / whole:.2f}",
                _gain(row.gain_in_time, row.error),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gain(gain: float | None, error: float | None) -> str:
    if gain is None:
        return ""
    text = f"{gain:+.2f}" + ("" if error is None else f" ± {error:.2f}")
    return f"**{text}**" if verdict(gain, error) in ("better", "worse") else text


def _flags(flags: Mapping[str, Any]) -> str:
    texts = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            texts.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            texts.append(f"--{flag} " + " ".join(f"{key}={item}" for key, item in value.items()))
        else:
            texts.append(f'--{flag} "{value}"' if " " in str(value) else f"--{flag} {value}")
    return f"`{' '.join(texts)}`" if texts else ""


def _machines(results: Sequence[Result]) -> list[str]:
    names = ("device", "threads", "torch", "commit", "allocator")
    found: dict[tuple[Any, ...], int] = {}
    for result in results:
        key = tuple(result[name] for name in names)
        found[key] = found.get(key, 0) + 1
    return [
        f"- {count} runs on {device}, {threads} threads, torch {torch}, commit {commit}"
        f" ({allocator})"
        for (device, threads, torch, commit, allocator), count in sorted(found.items(), key=str)
    ]
