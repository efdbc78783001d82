"""`python -m benchmarks scale`: a model of step time over bandwidth, for data-parallel training.

    all-reduce = 2 (n - 1) (messages * latency + bytes / (n * bandwidth))
    step       = forward + backward + packing + communication that the backward waits for
                 + max(0, other communication - overlap * backward)

The number of ranks n, bandwidth, latency and overlap are parameters. The inputs are measured in one
process: times of the dense and the sparse step (`python -m benchmarks breakdown`), bytes and
messages that a step sends, and the time to pack kept rows (`benchmarks.communication`). By default
they come from a file; `--steps` measures bytes, messages and packing again and takes the step times
from a result of `breakdown`. There are three kinds of step:

    dense   each rank sends whole gradients
    sparse  a sparse step; each rank selects on its own and sends whole gradients
    kept    a sparse step; all ranks share one selection and send scores, then kept rows
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.communication import Communication, measure
from benchmarks.machine import environment
from benchmarks.results import read, save

__all__ = ["GBITS", "LATENCY_US", "RANKS", "Inputs", "Network", "add_parser", "markdown"]
__all__ += ["step_times"]

RANKS = (2, 8, 64)
GBITS = (0.1, 1.0, 10.0, 100.0)
LATENCY_US = 20.0
_INPUTS = Path(__file__).parent / "results/cpu-2-cores/scale-resnet50.json"


@dataclass(frozen=True, kw_only=True)
class Inputs(Communication):
    """Inputs of the model: what a step sends, and how long it computes.

    Attributes:
        model: name, resolution, batch, precision, layout.
        drop_rate: drop rate of the sparse step.
        dense_forward_ms, dense_backward_ms: milliseconds of the dense step.
        sparse_forward_ms, sparse_backward_ms: milliseconds of the sparse step.
    """

    model: str
    drop_rate: float
    dense_forward_ms: float
    dense_backward_ms: float
    sparse_forward_ms: float
    sparse_backward_ms: float


@dataclass(frozen=True)
class Network:
    """The network between the ranks.

    Attributes:
        ranks: number of ranks, each with its own link.
        gbits: bandwidth of a link in each direction, in gigabits per second.
        latency_us: latency of a message between two ranks, in microseconds.
    """

    ranks: int
    gbits: float
    latency_us: float

    def all_reduce_ms(self, size: int, messages: int) -> float:
        """Return the milliseconds of sequential ring all-reduces.

        In a ring each rank sends 2 (n - 1) / n of the bytes, in 2 (n - 1) messages one after
        another (Patarasuk and Yuan, Bandwidth Optimal All-reduce Algorithms for Clusters of
        Workstations, 2009).

        Args:
            size: total bytes of all all-reduces.
            messages: number of all-reduces.

        Example:
            >>> Network(ranks=2, gbits=8, latency_us=10).all_reduce_ms(3_000_000, 1)
            3.02
        """
        bytes_of_ms = self.gbits * 1e9 / 8 / 1e3
        latency_ms = messages * self.latency_us / 1e3
        return 2 * (self.ranks - 1) * (latency_ms + size / (self.ranks * bytes_of_ms))


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "scale",
        help="a model of step time over ranks and bandwidth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inputs", type=Path, default=_INPUTS, help="JSON file of inputs")
    parser.add_argument("--steps", type=Path, help="JSON file of `breakdown`: measure the rest")
    parser.add_argument("--output", help="folder for a JSON file of measured inputs")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--gbits", type=float, nargs="+", default=list(GBITS))
    parser.add_argument("--latency-us", type=float, default=LATENCY_US, help="latency of a message")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the inputs and speed-ups, as in docs/scale.md."""
    if args.steps:
        inputs = _measure(args.steps)
        if args.output:
            name = f"scale-{inputs.model.split()[0]}"
            save([inputs], environment("cpu"), args.output, name)
    else:
        inputs = Inputs(**read(args.inputs)[0])
    print(markdown(inputs, args.ranks, args.gbits, args.latency_us))


def step_times(inputs: Inputs, network: Network, overlap: float) -> tuple[float, float, float]:
    """Return the milliseconds of a dense step, a sparse step, and one that sends kept rows.

    Args:
        inputs: the measured inputs.
        network: the network between the ranks.
        overlap: share of the backward that can hide communication of gradients, from 0 to 1.
    """

    def step(forward: float, backward: float, sent: float, not_hidden: float = 0.0) -> float:
        return forward + backward + not_hidden + max(0.0, sent - overlap * backward)

    dense = inputs.dense_forward_ms, inputs.dense_backward_ms
    sparse = inputs.sparse_forward_ms, inputs.sparse_backward_ms
    whole = network.all_reduce_ms(inputs.gradient_bytes, inputs.buckets)
    kept = network.all_reduce_ms(inputs.kept_bytes, inputs.buckets)
    agreeing = network.all_reduce_ms(inputs.score_bytes, inputs.layers)
    agreeing += network.all_reduce_ms(inputs.row_bytes, inputs.buckets)
    return (
        step(*dense, whole),
        step(*sparse, whole),
        step(*sparse, kept, inputs.packing_ms + agreeing),
    )


def markdown(
    inputs: Inputs, ranks: Sequence[int], gbits: Sequence[float], latency_us: float
) -> str:
    """Return the tables of docs/scale.md."""
    share = (inputs.kept_bytes + inputs.row_bytes) / inputs.gradient_bytes
    lines = [
        f"| input ({inputs.model}, drop rate {inputs.drop_rate:g}) | |",
        "|---|---|",
        f"| dense step: forward, backward | {inputs.dense_forward_ms:.0f} ms,"
        f" {inputs.dense_backward_ms:.0f} ms |",
        f"| sparse step: forward, backward | {inputs.sparse_forward_ms:.0f} ms,"
        f" {inputs.sparse_backward_ms:.0f} ms |",
        f"| gradients | {inputs.gradient_bytes / 1e6:.1f} MB, {inputs.buckets} all-reduces |",
        f"| kept rows | {inputs.kept_bytes / 1e6:.1f} MB, {inputs.buckets} all-reduces |",
        f"| agreeing on rows | {inputs.row_bytes / 1e3:.0f} kB, {inputs.buckets} all-reduces |",
        f"| scores | {inputs.score_bytes / 1e3:.0f} kB, {inputs.layers} all-reduces |",
        f"| kept rows and agreeing on them, share of the gradients | {share:.2f} |",
        f"| packing kept rows | {inputs.packing_ms:.0f} ms |",
        "",
        f"| ranks | overlap | sent | {' | '.join(f'{width:g} Gbit/s' for width in gbits)} |",
        "|---" * (3 + len(gbits)) + "|",
    ]
    for number, overlap in itertools.product(ranks, (0, 1)):
        networks = [Network(number, width, latency_us) for width in gbits]
        dense, *others = zip(*(step_times(inputs, n, overlap) for n in networks), strict=True)
        for sent, times in zip(("gradients", "kept rows"), others, strict=True):
            speeds = [f"{d / ms:.2f}" for d, ms in zip(dense, times, strict=True)]
            lines.append(f"| {number} | {overlap} | {sent} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def _measure(steps: Path) -> Inputs:
    dense, sparse = read(steps)
    return Inputs(
        **asdict(measure(dense["model"].split()[0], sparse["drop_rate"])),
        model=dense["model"],
        drop_rate=sparse["drop_rate"],
        dense_forward_ms=dense["forward_ms"],
        dense_backward_ms=dense["step_ms"] - dense["forward_ms"],
        sparse_forward_ms=sparse["forward_ms"],
        sparse_backward_ms=sparse["step_ms"] - sparse["forward_ms"],
    )
