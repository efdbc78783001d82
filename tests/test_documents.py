"""Figures in the README and in docs/performance.md match the saved results."""

import json
from pathlib import Path

import pytest
from sources import ROOT

from benchmarks import markdown
from benchmarks.saved import report

README = (ROOT / "README.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
AVX512 = RESULTS / "cpu-2-cores-avx512"
SAMPLES = RESULTS / "cpu-1-thread-avx512"
DROP_RATE = 0.8
COLUMNS = ("step_ms", "forward_ms", "conv_ms", "product_ms", "topk_ms", "rest_ms")


def saved(folder: Path, kind: str) -> list[list[dict]]:
    """The rows of each saved file of one kind."""
    return [json.loads(p.read_text())["rows"] for p in sorted(folder.glob(f"{kind}-*.json"))]


def test_the_readme_is_short_and_its_links_work_on_a_package_index():
    assert len(README.splitlines()) <= 120
    targets = [part.split(")")[0] for part in README.split("](")[1:]]
    assert targets
    assert all(target.startswith("https://") for target in targets)


def test_the_readme_shows_the_saved_step_times():
    rows = [line for line in README.splitlines() if line.endswith(" |") and "---" not in line]
    files = saved(SAMPLES, "samples")
    for steps in files:
        sliced = {r["drop_rate"]: r["speedup"] for r in steps if r["variant"] == "sliced"}
        dense = next(r for r in steps if r["variant"] == "dense")
        cells = [dense["model"], f"{dense['step_ms']:.0f}", f"{sliced[0.5]:.2f}"]
        assert f"| {' | '.join([*cells, f'{sliced[0.8]:.2f}'])} |" in rows
    assert len(rows) == 1 + len(files), "the header and a row a file"


def test_the_readme_says_how_much_channels_save():
    speedups = [
        row["speedup"]
        for steps in saved(AVX512, "step")
        for row in steps
        if (row["variant"], row["drop_rate"]) == ("ssprop", DROP_RATE)
    ]
    text = f"{min(speedups):.1f} to {max(speedups):.1f} times faster"
    assert text in " ".join(README.split())


def test_the_table_of_samples_is_of_the_saved_results():
    made = markdown.samples_markdown(saved(SAMPLES, "samples"))
    assert made in PERFORMANCE, "python -m benchmarks table benchmarks/results/cpu-1-thread-avx512"


@pytest.mark.parametrize("folder", ["cpu-2-cores-avx512", "cpu-2-cores"])
def test_the_tables_of_step_times_are_of_the_saved_results(folder):
    made = markdown.markdown(saved(RESULTS / folder, "step"), DROP_RATE)
    assert made in PERFORMANCE, f"python -m benchmarks table benchmarks/results/{folder}"


def test_the_table_of_drop_rates_is_of_the_saved_results():
    files = saved(AVX512, "scaling")
    assert files
    for rows in files:
        speedups = [
            f"{row['speedup']:.2f}"
            for row in rows
            if row["variant"] == "ssprop" and row["drop_rate"] > 0
        ]
        assert f"| {rows[0]['model']} | {' | '.join(speedups)} |" in PERFORMANCE


def test_the_breakdown_is_of_the_saved_results():
    files = saved(AVX512, "breakdown") + saved(RESULTS / "cpu-2-cores", "breakdown")
    assert files
    for row in (row for rows in files for row in rows):
        cells = [row["model"], row["variant"], *(f"{row[name]:.0f}" for name in COLUMNS)]
        assert f"| {' | '.join(cells)} |" in PERFORMANCE


def test_the_compile_times_are_of_the_saved_results():
    ((dense, sparse),) = saved(AVX512, "compile")
    text = " ".join(PERFORMANCE.split())
    assert f"compiles in {sparse['ratio']:.2f} times the dense step's time" in text
    assert f"interval {sparse['ratio_low']:.2f} to {sparse['ratio_high']:.2f})" in text
    assert f"{sparse['cold_s']:.0f} s against {dense['cold_s']:.0f} s" in text
    assert {f"{row['warm_s']:.1f}" for row in (dense, sparse)} == {"3.2"}
    assert "both take 3.2 s" in text


def test_the_tables_of_memory_are_of_the_saved_results():
    page = (ROOT / "docs" / "memory.md").read_text()
    assert report.saved_markdown(saved(SAMPLES, "saved")) in page
    assert report.bytes_markdown(saved(SAMPLES, "bytes")) in page
