"""The examples run."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_msbp_mlp_prints_a_row_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--seeds 1 --epochs 5 --hidden 32 --drop-rate 0.75 --memory 0.5 --backend aot_eager"
    runpy.run_path(str(EXAMPLES / "msbp_mlp.py"))["main"](flags.split())
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("method")
    assert [row[:16].strip() for row in rows] == ["dense", "SBP", "MSBP, eta 0.5"]
    # Chance is 10 %.
    assert all(float(row.split()[-3]) > 20 for row in rows)
