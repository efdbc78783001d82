"""The cost of a run, in epochs of dense training of the task's reference model.

Wall time on a shared machine means little. So the study counts two other costs:

- *arithmetic*: the forward is 1 part; the backward is 2 parts, minus the fraction `backward_saved`;
- *time*: the dense time, minus what that saving is worth in a measured step (`time_per_saving`).
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MEASURED", "Cost", "cost", "dense_accuracy", "time_per_saving"]

# The measured step that time is based on: ResNet-18 at drop rate 0.8.
MEASURED = (
    Path(__file__).parents[1] / "results/cpu-2-cores/step-resnet18-64-b64-fp32-channels_last.json"
)


@dataclass(frozen=True)
class Cost:
    """Cost of a run, in epochs of dense training of the reference model.

    Attributes:
        arithmetic: cost in floating-point operations.
        time: cost in time, if steps speed up like the measured step.
    """

    arithmetic: float
    time: float


def time_per_saving(path: Path = MEASURED) -> float:
    """Return the saved fraction of a dense step's time over the saved fraction of the backward.

    Args:
        path: result of `python -m benchmarks step`, with a row of the variant "ssprop" at drop
            rate 0.8.
    """
    rows = json.loads(path.read_text())["rows"]
    (row,) = (row for row in rows if row["variant"] == "ssprop" and row["drop_rate"] == 0.8)
    return float((1 - 1 / row["speedup"]) / row["saved_flops"])


def cost(epochs: int, backward_saved: float, relative_flops: float, per_saving: float) -> Cost:
    """Return the cost of a run.

    Args:
        epochs: its epochs.
        backward_saved: mean fraction of the backward's FLOPs left out.
        relative_flops: FLOPs of its model over FLOPs of the reference model; time is assumed to be
            proportional to them.
        per_saving: the result of `time_per_saving`.

    Example:
        >>> cost(10, 0.3, 1.0, 0.5)
        Cost(arithmetic=8.0, time=8.5)
    """
    scale = epochs * relative_flops
    return Cost(scale * (1 - 2 / 3 * backward_saved), scale * (1 - per_saving * backward_saved))


def dense_accuracy(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """Return the accuracy of dense training at a cost, interpolated linearly between its runs.

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
