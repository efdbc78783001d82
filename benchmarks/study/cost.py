"""What a run costs, in epochs of dense training of the task's reference model.

Wall time on a shared machine means little. Two costs are counted instead:

- *arithmetic*: the forward is 1 part; the backward is 2, less `backward_saved` of them;
- *time*: what that saving is worth in a measured step, `time_per_saving`.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MEASURED", "Cost", "cost", "dense_accuracy", "time_per_saving"]

# The measured step that stands for time: ResNet-18 at drop rate 0.8.
MEASURED = (
    Path(__file__).parents[1] / "results/cpu-2-cores/step-resnet18-64-b64-fp32-channels_last.json"
)


@dataclass(frozen=True)
class Cost:
    """Cost of a run, in epochs of dense training of the reference model.

    Attributes:
        arithmetic: floating-point operations.
        time: the same in time, were steps sped up as the measured one was.
    """

    arithmetic: float
    time: float


def time_per_saving(path: Path = MEASURED) -> float:
    """Return the part of a dense step's time saved for each part of the backward left out.

    Args:
        path: result of `python -m benchmarks step`, with a row of the variant "ssprop" at drop
            rate 0.8.
    """
    rows = json.loads(path.read_text())["rows"]
    (row,) = (row for row in rows if row["variant"] == "ssprop" and row["drop_rate"] == 0.8)
    return float((1 - 1 / row["speedup"]) / row["saved_flops"])


def cost(epochs: int, backward_saved: float, relative_flops: float, per_saving: float) -> Cost:
    """Return what a run costs.

    Args:
        epochs: its epochs.
        backward_saved: mean fraction of the backward's FLOPs left out.
        relative_flops: FLOPs of its model over those of the reference model; time is taken to
            be in proportion to them.
        per_saving: what `time_per_saving` returned.

    Example:
        >>> cost(10, 0.3, 1.0, 0.5)
        Cost(arithmetic=8.0, time=8.5)
    """
    scale = epochs * relative_flops
    return Cost(scale * (1 - 2 / 3 * backward_saved), scale * (1 - per_saving * backward_saved))


def dense_accuracy(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """Return what dense training reaches at a cost, on straight lines between its runs.

    Args:
        curve: (epochs, accuracy) of dense runs.
        at: the cost, in epochs.

    Returns:
        The accuracy; None outside the curve.

    Example:
        >>> dense_accuracy([(10, 70.0), (6, 66.0)], at=9)
        69.0
    """
    points = sorted(curve)
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[0][1] if points and points[0][0] == at else None
