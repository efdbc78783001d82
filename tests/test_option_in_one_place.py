"""An option is one field of SparsityConfig: all else that shows it is made from that."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sources import FOLDERS, ROOT

FIELDS = """
    new_switch: bool = option(False, help="Switch on something new", inspect=True)
    new_share: float = option(0.25, help="Take this share of it", rule="in [0, 1)")
"""
LAST = "    telemetry: bool = option("


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python with a copy of the package whose SparsityConfig has two more fields."""
    folder = tmp_path_factory.mktemp("copy")
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(FOLDERS["ssprop_fx"], folder / "ssprop_fx", ignore=skipped)
    config = folder / "ssprop_fx" / "config.py"
    source = config.read_text()
    assert source.count(LAST) == 1
    config.write_text(source.replace(LAST, FIELDS.strip("\n") + "\n" + LAST))
    path = os.pathsep.join([str(folder), str(FOLDERS["ssprop_passes"].parent)])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            **{"capture_output": True, "text": True, "cwd": folder},
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "100"},
        )

    return run


MAIN = "import sys; from ssprop_fx.cli.app import main; sys.exit(main(sys.argv[1:]))"


def test_the_commands_have_the_flags(python):
    text = python("-c", MAIN, "train", "--help").stdout
    assert "--new-switch, --no-new-switch" in text
    assert "Switch on something new (default: no)" in text
    assert "Take this share of it (default: 0.25)" in text
    text = python("-c", MAIN, "inspect", "--help").stdout
    assert "--new-switch, --no-new-switch" in text
    assert "--new-share" not in text


def test_flags_a_file_the_environment_and_options_give_values(python, tmp_path):
    (tmp_path / "c.yaml").write_text("new_switch: true\nnew-share: 0.5\n")
    code = f"""
from ssprop_fx.cli.app import main
from ssprop_fx.named_backend.options import read_settings
from ssprop_fx.training import run
seen = []
run.train = lambda config, **kwargs: seen.append(config) or 0
main(["train", "--config", {str(tmp_path / "c.yaml")!r}])
main(["train", "--new-switch", "--new-share", "0.75"])
read = read_settings(None, {{"new_switch": True}}, {{"SSPROP_SCHEDULE": "none",
    "SSPROP_NEW_SHARE": "0.125", "SSPROP_NEW_SWITCH": "no"}})
configs = [*(config.sparsity for config in seen), read.config]
print([(config.new_switch, config.new_share) for config in configs])
print(seen[1].to_dict()["new_share"])
main(["train", "--new-share", "2"])
"""
    done = python("-c", code)
    assert done.stdout.splitlines() == ["[(True, 0.5), (True, 0.75), (True, 0.125)]", "0.75"]
    assert done.stderr.endswith("ssprop-fx: error: --new-share must be in [0, 1), got 2.0\n")


def test_the_page_has_the_rows(python):
    page = python(str(ROOT / "docs" / "configuration.py")).stdout
    assert "| `new_switch` | switch | `no` | `--new-switch`, `SSPROP_NEW_SWITCH`, in" in page
    assert "| `new_share` | number, in [0, 1) | `0.25` | `--new-share`, `SSPROP_NEW_SHARE`" in page


def test_the_page_in_the_repository_is_what_the_command_prints():
    script = ROOT / "docs" / "configuration.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == Path(ROOT / "docs" / "configuration.md").read_text(), (
        "python docs/configuration.py > docs/configuration.md"
    )


def test_a_field_that_is_no_option_is_named(python):
    code = """
from dataclasses import dataclass
from ssprop_fx.options import options_of
@dataclass
class Settings:
    plain: int = 3
options_of(Settings)
"""
    assert "Settings.plain must be option(default, help=...)" in python("-c", code).stderr
