"""What the model of data-parallel steps says of one workload: rows, and limits in bandwidth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.communication import Communication
from benchmarks.scale_model import Network, Part, Step, faster_below_gbits

__all__ = ["Inputs", "LimitRow", "ScaleRow", "inputs_of", "limits", "scale", "steps"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the model is fed.

    Attributes:
        model: name, resolution, batch, precision, layout.
        drop_rate: of the sparse step.
        dense_forward_ms, dense_backward_ms, sparse_forward_ms, sparse_backward_ms: arithmetic.
        packing_ms: gathering and scattering kept rows, milliseconds of one processor.
        gradient_bytes, buckets: what a plain step sends.
        kept_bytes, row_bytes: what kept rows send, and agreeing on them.
        score_bytes, layers: what the shared selection sends.
        kept_share: all that kept rows send, by `gradient_bytes`.
    """

    model: str
    drop_rate: float
    dense_forward_ms: float
    dense_backward_ms: float
    sparse_forward_ms: float
    sparse_backward_ms: float
    packing_ms: float
    gradient_bytes: int
    buckets: int
    kept_bytes: int
    row_bytes: int
    score_bytes: int
    layers: int
    kept_share: float


@dataclass(frozen=True, kw_only=True)
class ScaleRow:
    """Step times at one bandwidth, milliseconds, and speed-ups over the dense step there."""

    ranks: int
    latency_us: float
    overlap: float
    gbits: float
    dense_ms: float
    sparse_ms: float
    kept_ms: float
    sparse_speedup: float
    kept_speedup: float


@dataclass(frozen=True, kw_only=True)
class LimitRow:
    """Bandwidths, gigabits per second, at which something changes.

    Attributes:
        ranks, latency_us, overlap: as in `ScaleRow`.
        little_below: below it the sparse step that sends whole gradients gains less than 10 %.
        kept_below: below it kept rows are faster than whole gradients, sparse both times.
        wins_below: below it kept rows are faster than dense; infinite where they always are.
        free_above: above it communication takes less than 5 % of the dense step's arithmetic.
        latency_limit_us: latency at which kept rows are no faster than dense, however large the
            bandwidth.
    """

    ranks: int
    latency_us: float
    overlap: float
    little_below: float
    kept_below: float
    wins_below: float
    free_above: float
    latency_limit_us: float


def inputs_of(dense: Mapping[str, Any], sparse: Mapping[str, Any], alone: Communication) -> Inputs:
    """Return the inputs.

    Args:
        dense: record of BreakdownRow, of the dense step.
        sparse: that of the sparse one.
        alone: what one rank communicates.
    """
    return Inputs(
        model=dense["model"],
        drop_rate=sparse["drop_rate"],
        dense_forward_ms=dense["forward_ms"],
        dense_backward_ms=dense["step_ms"] - dense["forward_ms"],
        sparse_forward_ms=sparse["forward_ms"],
        sparse_backward_ms=sparse["step_ms"] - sparse["forward_ms"],
        packing_ms=alone.packing_ms,
        gradient_bytes=alone.gradients.size,
        buckets=alone.gradients.messages,
        kept_bytes=alone.kept.size,
        row_bytes=alone.rows.size,
        score_bytes=alone.scores.size,
        layers=alone.scores.messages,
        kept_share=(alone.kept.size + alone.rows.size) / alone.gradients.size,
    )


def steps(inputs: Inputs) -> dict[str, Step]:
    """Return the three kinds of step."""
    gradients = Part(inputs.gradient_bytes, inputs.buckets)
    sparse = (inputs.sparse_forward_ms, inputs.sparse_backward_ms)
    return {
        "dense": Step(inputs.dense_forward_ms, inputs.dense_backward_ms, gradients),
        "sparse": Step(*sparse, gradients),
        "kept": Step(
            *sparse,
            Part(inputs.kept_bytes, inputs.buckets),
            serial=(
                Part(inputs.score_bytes, inputs.layers),
                Part(inputs.row_bytes, inputs.buckets),
            ),
            packing_ms=inputs.packing_ms,
        ),
    }


def scale(
    inputs: Inputs, ranks: int, latency_us: float, overlap: float, gbits: Sequence[float]
) -> list[ScaleRow]:
    """Return the rows of some bandwidths."""
    rows = []
    for bandwidth in gbits:
        network = Network(ranks, bandwidth, latency_us)
        ms = {name: step.ms(network, overlap) for name, step in steps(inputs).items()}
        rows.append(
            ScaleRow(
                ranks=ranks,
                latency_us=latency_us,
                overlap=overlap,
                gbits=bandwidth,
                dense_ms=ms["dense"],
                sparse_ms=ms["sparse"],
                kept_ms=ms["kept"],
                sparse_speedup=ms["dense"] / ms["sparse"],
                kept_speedup=ms["dense"] / ms["kept"],
            )
        )
    return rows


def limits(inputs: Inputs, ranks: int, latency_us: float, overlap: float) -> LimitRow:
    """Return the bandwidths at which something changes."""
    made = steps(inputs)

    def ms(name: str, gbits: float) -> float:
        return made[name].ms(Network(ranks, gbits, latency_us), overlap)

    dense, kept = made["dense"], made["kept"]
    messages = sum(part.messages for part in kept.serial)
    if not overlap:
        messages += kept.overlapping.messages - dense.overlapping.messages
    saved_us = (dense.compute_ms - kept.compute_ms) * 1e3
    return LimitRow(
        ranks=ranks,
        latency_us=latency_us,
        overlap=overlap,
        little_below=faster_below_gbits(lambda g: ms("dense", g) < 1.1 * ms("sparse", g)),
        kept_below=faster_below_gbits(lambda g: ms("kept", g) < ms("sparse", g)),
        wins_below=faster_below_gbits(lambda g: ms("kept", g) < ms("dense", g)),
        free_above=faster_below_gbits(lambda g: ms("dense", g) > 1.05 * dense.compute_ms),
        latency_limit_us=saved_us / (2 * (ranks - 1) * messages) if messages else math.inf,
    )
