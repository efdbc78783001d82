"""The summary that a run prints at its end: step times, saved FLOPs, accuracy, energy."""

import math
from statistics import fmean, quantiles

from ssprop_fx.training.records.logs import Records
from ssprop_fx.training.records.rows import median_ms, step_times

__all__ = ["format_summary"]

# From this share of samples kept on, a step is hardly faster.
_SAVES_NOTHING = 0.9


def format_summary(records: Records, batch_size: int, why_no_energy: str = "") -> str:
    """Return the summary of a run.

    Args:
        records: rows of the run.
        batch_size: training images in a step.
        why_no_energy: why energy was not measured; "" if it was.

    Returns:
        Several lines without a final newline; "-" stands for a missing time or saving.
    """
    lines = [f"{'phase':<8}{'steps':>8}{'median ms/step':>16}{'quartiles':>18}{'images/s':>11}"]
    medians = {}
    for name, sparse in (("dense", False), ("sparse", True)):
        steps = sum((row.drop_rate > 0) == sparse for row in records.steps)
        ms = medians[name] = median_ms(records.steps, sparse=sparse)
        lines.append(
            f"{name:<8}{steps:>8}{_number(ms, '.1f'):>16}{_quartiles(records, sparse):>18}"
            f"{_number(1000 * batch_size / ms, '.0f'):>11}"
        )
    lines.append(
        f"speed-up of a sparse step: {_number(medians['dense'] / medians['sparse'], '.2f')}"
    )

    sparse_saved = [row.backward_saved for row in records.steps if row.drop_rate > 0]
    if sparse_saved:
        saved = fmean(row.backward_saved for row in records.steps)
        lines.append(
            f"backward FLOPs saved: {_number(fmean(sparse_saved), '.1%')} of a sparse step,"
            f" {_number(saved, '.1%')} of the run"
        )
    lines += _samples(records)
    if records.epochs:
        best = max(records.epochs, key=lambda row: row.eval_top1)
        lines.append(
            f"top-1 accuracy: {records.epochs[-1].eval_top1:.2f} % at the end,"
            f" {best.eval_top1:.2f} % at best (epoch {best.epoch})"
        )
        lines.append(f"energy: {_energy(records, why_no_energy)}")
    return "\n".join(lines)


def _samples(records: Records) -> list[str]:
    """Say what the choice of samples kept; nothing if no step chose samples."""
    rows = [row for row in records.steps if not math.isnan(row.added_noise)]
    if not rows:
        return []
    kept = 1 - fmean(row.drop_rate for row in rows)
    line = (
        f"samples kept: {kept:.1%} of a batch, with {fmean(row.kept_mass for row in rows):.1%} of"
        f" the gradients' norms; added noise {fmean(row.added_noise for row in rows):.2f}"
    )
    if kept > _SAVES_NOTHING:
        line += (
            "; this saves next to nothing: nearly all samples matter, as they do early in training"
            " and with label smoothing or mixup"
        )
    return [line]


def _energy(records: Records, why_not: str) -> str:
    totals = {
        "GPU": sum(row.gpu_joules for row in records.epochs),
        "CPU": sum(row.cpu_joules for row in records.epochs),
    }
    measured = [f"{name} {joules:.0f} J" for name, joules in totals.items() if joules == joules]
    return ", ".join(measured) or f"not available ({why_not or 'not in all epochs'})"


def _quartiles(records: Records, sparse: bool) -> str:
    # A wide range means that the machine was busy with other work as well.
    times = step_times(records.steps, sparse=sparse)
    if len(times) < 2:
        return "-"
    lower, _, upper = quantiles(times, n=4, method="inclusive")
    return f"{lower:.1f} to {upper:.1f}"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
