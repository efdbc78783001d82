"""Command line of the benchmarks."""

import argparse

from benchmarks import markdown, step


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="BENCHMARK")
    step.add_parser(subparsers)
    markdown.add_parser(subparsers)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
