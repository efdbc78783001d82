"""What the tests of the benchmarks share."""

import argparse
import csv
import json
from dataclasses import fields
from pathlib import Path

from benchmarks.__main__ import COMMANDS


def parse(command: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    for module in COMMANDS:
        module.add_parser(subparsers)
    return parser.parse_args(command)


def rows_of(folder: Path, row: type) -> list[dict]:
    """Run through what a command wrote: one JSON, the same rows as CSV, maybe a picture."""
    (path,) = folder.glob("*.json")
    content = json.loads(path.read_text())
    assert content["environment"].keys() == {"device", "threads", "torch", "commit", "allocator"}
    with path.with_suffix(".csv").open() as file:
        lines = list(csv.DictReader(file))
    names = [field.name for field in fields(row)]
    assert list(lines[0]) == names
    assert [list(record) for record in content["rows"]] == [names] * len(lines)
    return content["rows"]
