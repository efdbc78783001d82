"""The worked examples of CONTRIBUTING.md work as it says, applied to a copy of the packages."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from sources import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()

# What the text claims about each example, in addition to the tests that it gives.
CLAIMS = {
    "Add a score": """
from ssprop_passes.selection.scores import mean_root
assert SparsityConfig(score="mean_root").selection.score is mean_root
assert flags(["--score", "mean_root"]).score == "mean_root"
assert variables(SSPROP_SCORE="mean_root").config.selection.score is mean_root
""",
    "Add a schedule": """
from ssprop_fx.scheduling.parse import parse_schedule
from ssprop_fx.training.config import TrainConfig
assert "sawtooth" in ssprop_fx.__all__
expected = ssprop_fx.sawtooth(0.0, 0.8, period=6)
assert parse_schedule("sawtooth:low=0,high=0.8,period=2ep", steps_per_epoch=3) == expected
TrainConfig.from_settings({"schedule": "sawtooth:low=0,high=0.8,period=2ep"})
assert variables(SSPROP_SCHEDULE="sawtooth:low=0,high=0.8,period=6").schedule == expected
""",
    "Add a config option": """
from ssprop_fx.training.config_file import read_arguments
assert flags(["--max-channels", "64"]).max_channels == 64
assert variables(SSPROP_MAX_CHANNELS="64").config.max_channels == 64
pathlib.Path("run.yaml").write_text("max_channels: 64")
assert flags(read_arguments("run.yaml")).max_channels == 64
""",
}

PROGRAM = """
import argparse, pathlib, ssprop_fx
from ssprop_fx import SparsityConfig
from ssprop_fx.cli.train import add_parser
from ssprop_fx.named_backend.options import read_settings

assert pathlib.Path(ssprop_fx.__file__).is_relative_to(pathlib.Path.cwd())

def flags(arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["train", *arguments])

def variables(**environ):
    return read_settings(None, None, {"SSPROP_SCHEDULE": "none", **environ})

def test_claims():
"""


def blocks(title: str) -> list[tuple[str, str, str]]:
    """Language, file and content of each code block in a section."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return re.findall(r'^```(\w+) title="(.+?)"\n(.*?)^```$', section, re.MULTILINE | re.DOTALL)


def apply(diff: str, source: str) -> str:
    """Return a source with a diff applied; each hunk must fit in exactly one place."""
    for hunk in diff.split("@@\n"):
        lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
        assert {sign for sign, _ in lines} <= {"", " ", "+", "-"}
        before = "".join(f"{line}\n" for sign, line in lines if sign != "+")
        after = "".join(f"{line}\n" for sign, line in lines if sign != "-")
        assert source.count(before) == 1, f"the file has not, once:\n{before}"
        source = source.replace(before, after)
    return source


def run(folder: Path, *command: str) -> None:
    paths = [str(folder), str(folder / "passes")]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "tests"),
    [
        ("Add a score", ["-k", "claims or mean_root", "tests/passes/selection/test_selection.py"]),
        ("Add a schedule", ["tests/scheduling/test_sawtooth.py"]),
        ("Add a config option", ["tests/test_max_channels.py"]),
    ],
    ids=["score", "schedule", "option"],
)
def test_a_worked_example_works(title: str, tests: list[str], tmp_path: Path) -> None:
    for name in ("ssprop_fx", "passes", "tests", "benchmarks"):
        left_out = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (_, source, _), (_, test, _) = blocks(title)
    assert not source.startswith("tests/")
    assert test.startswith("tests/")
    for language, name, content in blocks(title):
        path = tmp_path / name
        path.write_text(apply(content, path.read_text()) if language == "diff" else content)
    (tmp_path / "test_claims.py").write_text(PROGRAM + textwrap.indent(CLAIMS[title], "    "))
    run(tmp_path, "-m", "pytest", "-q", "--doctest-modules", "test_claims.py", source, *tests)
    run(tmp_path, "-m", "ruff", "check", source, test)
    run(tmp_path, "-m", "ruff", "format", "--check", source, test)


def test_every_target_of_make_is_told() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    told = set(re.findall(r"^\| `make ([\w-]+)", TEXT, re.MULTILINE))
    assert told == set(phony.split()) - {"venv", "bench"}
