"""Helpers of the benchmarks' tests."""

import argparse
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
    """Return the rows of a command's only JSON file, after a check of their fields."""
    (path,) = folder.glob("*.json")
    content = json.loads(path.read_text())
    assert content["environment"].keys() == {"device", "threads", "torch", "commit", "allocator"}
    assert content["rows"]
    names = [field.name for field in fields(row)]
    assert all(list(record) == names for record in content["rows"])
    return content["rows"]
