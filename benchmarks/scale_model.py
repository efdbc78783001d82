"""A model of the time of a data-parallel step: arithmetic, gradients sent, layers that agree.

    all-reduce of b bytes in m messages among n ranks, as a ring:
        2 (n - 1) (m * latency + b / (n * bandwidth))

    step = compute + serial communication + max(0, other communication - overlap * backward)

The ring is that of Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms for Clusters of
Workstations, 2009: each rank sends and receives 2 (n - 1) / n of the bytes, in 2 (n - 1) messages
one after another. `overlap` is an assumption, not a measurement: 0 where nothing is sent while the
backward computes, 1 where all of the backward hides communication, which it never quite does, as
the last bucket of gradients is ready only at its end.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Network", "Part", "Step", "faster_below_gbits"]


@dataclass(frozen=True)
class Network:
    """What connects the ranks.

    Attributes:
        ranks: number of ranks, each with a link of its own.
        gbits: bandwidth of a link in each direction, gigabits per second.
        latency_us: of a message between two ranks, microseconds.
    """

    ranks: int
    gbits: float
    latency_us: float

    def all_reduce_ms(self, part: "Part") -> float:
        """Return the milliseconds of all-reduces, one after another, as rings.

        Example:
            >>> Network(ranks=2, gbits=8, latency_us=10).all_reduce_ms(Part(3_000_000, 1))
            3.02
        """
        bytes_of_ms = self.gbits * 1e9 / 8 / 1e3
        message_ms = part.messages * self.latency_us / 1e3
        return 2 * (self.ranks - 1) * (message_ms + part.size / (self.ranks * bytes_of_ms))


@dataclass(frozen=True)
class Part:
    """Tensors handed to all-reduces in each step.

    Attributes:
        size: of all of them, bytes.
        messages: their number.
    """

    size: int = 0
    messages: int = 0


@dataclass(frozen=True)
class Step:
    """What one rank does in a step.

    Attributes:
        forward_ms, backward_ms: arithmetic, milliseconds.
        packing_ms: what else the processor does to communicate; nothing overlaps with it.
        serial: communication that the backward waits for.
        overlapping: communication that the backward need not wait for.
    """

    forward_ms: float
    backward_ms: float
    overlapping: Part
    serial: tuple[Part, ...] = ()
    packing_ms: float = 0.0

    @property
    def compute_ms(self) -> float:
        """Milliseconds without communication."""
        return self.forward_ms + self.backward_ms + self.packing_ms

    def ms(self, network: Network, overlap: float) -> float:
        """Return the milliseconds of the step.

        Args:
            network: what connects the ranks; one rank alone sends nothing.
            overlap: share of the backward in which gradients are sent, from 0 to 1.

        Example:
            >>> step = Step(forward_ms=1, backward_ms=2, overlapping=Part(3_000_000, 1))
            >>> [step.ms(Network(2, gbits=8, latency_us=10), overlap) for overlap in (0, 1)]
            [6.02, 4.02]
        """
        waited = sum(network.all_reduce_ms(part) for part in self.serial)
        sent = network.all_reduce_ms(self.overlapping)
        return self.compute_ms + waited + max(0.0, sent - overlap * self.backward_ms)


def faster_below_gbits(is_faster: Callable[[float], bool]) -> float:
    """Return the bandwidth below which something is faster, gigabits per second.

    Args:
        is_faster: of a bandwidth; changes at most once, from True to False.

    Returns:
        The bandwidth to six digits; of 1e-4 to 1e5, 0 if it is faster at none of them and infinity
        if at all.

    Example:
        >>> round(faster_below_gbits(lambda gbits: gbits < 10), 3)
        10.0
        >>> faster_below_gbits(lambda gbits: True), faster_below_gbits(lambda gbits: False)
        (inf, 0.0)
    """
    low, high = 1e-4, 1e5
    if is_faster(high):
        return math.inf
    if not is_faster(low):
        return 0.0
    while high / low > 1 + 1e-7:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if is_faster(middle) else (low, middle)
    return high
