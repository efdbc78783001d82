"""The model of communication against gloo processes on this machine."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.communication import Communication
from benchmarks.scale_model import Network, Part

__all__ = ["CheckRow", "check", "fit"]


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """A measured time of communication and the model's.

    Attributes:
        ranks: processes.
        what: is sent.
        bytes, messages: of it.
        measured_ms: the shortest time.
        model_ms: by the network fitted to the first number of ranks.
        ratio: measured by model.
    """

    ranks: int
    what: str
    bytes: int
    messages: int
    measured_ms: float
    model_ms: float
    ratio: float


def fit(found: Communication, ranks: int) -> Network:
    """Return the network that single all-reduces of this many ranks fit best, by ratios.

    It has the least sum of log(time / model)^2, so that twice too slow counts as much as twice too
    fast, and a small all-reduce as much as a large one.
    """
    sizes, times = np.array(list(found.sizes_ms.items())).T
    # Milliseconds of a message, and of a byte: ms (1 + per_byte / ms * size) = time. The best ms of
    # a quotient is a geometric mean, so that only the quotient is to be searched for.
    low, high = -math.log(sizes.max()) - 20, -math.log(sizes.min()) + 20
    for _ in range(5):
        quotients = np.exp(np.linspace(low, high, 1001))
        logs = np.log(times) - np.log1p(np.outer(quotients, sizes))
        best = int(logs.var(1).argmin())
        low, high = np.log(quotients[max(best - 1, 0)]), np.log(quotients[min(best + 1, 1000)])
    ms = math.exp(logs[best].mean())
    messages = 2 * (ranks - 1)
    per_byte = quotients[best] * ms
    return Network(ranks, messages / ranks * 8 / (per_byte * 1e6), ms * 1e3 / messages)


def check(found: Mapping[int, Communication], alone: Communication) -> list[CheckRow]:
    """Compare measured times with the model's.

    Args:
        found: by number of ranks; the network is fitted to the first.
        alone: of one rank, for the time that packing takes a processor.
    """
    first = next(iter(found))
    fitted = fit(found[first], first)
    rows = []
    for ranks, measured in found.items():
        own = fit(measured, ranks)
        print(f"{ranks} ranks: {own.gbits:.2f} Gbit/s and {own.latency_us:.0f} us fit best")
        network = Network(ranks, fitted.gbits, fitted.latency_us)
        sent: dict[str, tuple[list[Part], float, float]] = {
            f"all-reduce of {size} bytes": ([Part(size, 1)], ms, 0.0)
            for size, ms in measured.sizes_ms.items()
        }
        sent["gradients"] = [measured.gradients], measured.gradients_ms, 0.0
        packing = alone.packing_ms
        sent["kept rows"] = [measured.rows, measured.kept], measured.kept_ms, packing
        sent["scores"] = [measured.scores], measured.scores_ms, 0.0
        for what, (parts, ms, other_ms) in sent.items():
            model_ms = other_ms + sum(map(network.all_reduce_ms, parts))
            rows.append(
                CheckRow(
                    ranks=ranks,
                    what=what,
                    bytes=sum(part.size for part in parts),
                    messages=sum(part.messages for part in parts),
                    measured_ms=ms,
                    model_ms=model_ms,
                    ratio=ms / model_ms,
                )
            )
    return rows
