"""Command line of the benchmarks."""

import argparse

from benchmarks import (
    breakdown,
    compile_time,
    export,
    layer,
    long_run,
    machine,
    markdown,
    pooling,
    scale,
    scaling,
    step,
    suite,
)
from benchmarks.gpu import command as gpu
from benchmarks.gpu import pack, study_command
from benchmarks.positions import command as positions
from benchmarks.saved import command as saved
from benchmarks.saved import report

COMMANDS = (
    *(step, breakdown, layer, pooling, positions, compile_time, scaling, scale, long_run, suite),
    *(saved, report),
    *(gpu, study_command, pack),
    *(markdown, export),
)


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="BENCHMARK")
    for module in COMMANDS:
        module.add_parser(subparsers)
    args = parser.parse_args()
    machine.allocator()
    args.run(args)


if __name__ == "__main__":
    main()
