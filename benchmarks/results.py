"""Rows of results: printed as a table, kept as CSV and JSON with the machine they come from."""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.timing import Timing

__all__ = ["Row", "environment", "save", "table"]


@dataclass(frozen=True)
class Row:
    """One variant of one model, in milliseconds and ratios.

    Attributes:
        model: name, resolution, batch, precision, layout.
        variant: `dense` or `drop RATE`.
        drop_rate: fraction of channels left out.
        median_ms, low_ms, high_ms: step time and its quartiles.
        speedup: dense median over this one.
        bound: the speed-up at efficiency 1.
        efficiency: saved time over the share of backward convolution time that was dropped; NaN
            at drop rate 0.
        saved_flops: share of the backward's floating-point operations that is not computed.
    """

    model: str
    variant: str
    drop_rate: float
    median_ms: float
    low_ms: float
    high_ms: float
    speedup: float
    bound: float
    efficiency: float
    saved_flops: float

    @staticmethod
    def of(
        model: str,
        variant: str,
        drop_rate: float,
        timing: Timing,
        dense_ms: float,
        conv_backward_ms: float,
        saved_flops: float,
    ) -> "Row":
        """Make a row from a timing and those of the dense step."""
        savable = drop_rate * conv_backward_ms
        return Row(
            model=model,
            variant=variant,
            drop_rate=drop_rate,
            median_ms=timing.median,
            low_ms=timing.low,
            high_ms=timing.high,
            speedup=dense_ms / timing.median,
            bound=dense_ms / (dense_ms - savable),
            efficiency=(dense_ms - timing.median) / savable if savable else float("nan"),
            saved_flops=saved_flops,
        )


def environment() -> dict[str, str | int]:
    """Return the machine, the versions and the allocator that a result was measured with."""
    is_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": _commit(),
        "allocator": ", ".join(
            f"{name}={os.environ[name]}"
            for name in ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
            if os.environ.get(name)
        )
        or "default",
    }


def table(rows: Sequence[Row], conv_backward_ms: float) -> str:
    """Return rows of one model as text, with the machine they come from."""
    lines = [
        "",
        f"{rows[0].model}: {conv_backward_ms:.1f} ms of the dense step are backward convolutions",
        f"{'variant':12} {'ms':>9} {'quartiles':>19} {'speed-up':>9} {'bound':>6}"
        f" {'efficiency':>10} {'backward FLOPs saved':>21}",
    ]
    lines += [
        f"{r.variant:12} {r.median_ms:9.1f} {r.low_ms:9.1f}-{r.high_ms:9.1f} {r.speedup:9.2f}"
        f" {r.bound:6.2f} {r.efficiency:10.2f} {r.saved_flops:21.0%}"
        for r in rows
    ]
    lines.append("; ".join(f"{key}: {value}" for key, value in environment().items()))
    return "\n".join(lines)


def save(rows: Sequence[Row], folder: str, name: str) -> None:
    """Write rows as `folder/name.csv` and, with the environment, as `folder/name.json`."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) for row in rows]
    with (path / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
    content = {"environment": environment(), "rows": records}
    (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
