"""`python -m benchmarks compile`: compile time of a model's variants, dense and sparse.

    cold     first step with an empty compile cache
    warm     first step of a second process with the cache of the first one
    import   importing ssprop_fx after torch

Each first step runs in a new process. The variants take turns; every second round reverses their
order. Compile time is the time of the first step minus the time of the second. The ratio is the
cold time over the cold time of dense: the median of the rounds, and its 95 % confidence interval.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

from benchmarks.first_step import VARIANTS
from benchmarks.machine import describe, environment
from benchmarks.results import save, table
from benchmarks.timing import Timing
from benchmarks.workload import Workload, add_workload_arguments, workload_of

__all__ = ["CompileRow", "add_parser", "measure"]

FORMATS = {
    "model": "",
    "variant": "",
    "cold_s": ".1f",
    "warm_s": ".1f",
    "ratio": ".2f",
    "ratio_low": ".2f",
    "ratio_high": ".2f",
    "import_s": ".2f",
}


@dataclass(frozen=True, kw_only=True)
class CompileRow:
    """Compile time of one variant of one model; medians, in seconds.

    Attributes:
        model: name, resolution, batch, precision, layout.
        variant: one of `first_step.VARIANTS`.
        cold_s, warm_s: with an empty compile cache, and with the cache of the cold compile.
        ratio: cold time over the cold time of dense in the same round.
        ratio_low, ratio_high: its 95 % confidence interval.
        import_s: time to import ssprop_fx after torch.
    """

    model: str
    variant: str
    cold_s: float
    warm_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    import_s: float


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "compile",
        help="compile time, cold and warm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", default=["resnet18"], help="timm models")
    add_workload_arguments(parser, model=None)
    parser.add_argument("--rounds", type=int, default=1, help="cold compiles of each variant")
    parser.add_argument("--output", help="folder for a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table."""
    workloads = [workload_of(args, model) for model in args.models]
    rows = [row for workload in workloads for row in measure(workload, args.rounds)]
    print(table(rows, FORMATS))
    print(describe(args.device))
    if args.output:
        for workload in workloads:
            of_model = [row for row in rows if row.model == workload.title]
            save(of_model, environment(args.device), args.output, f"compile-{workload.slug}")


def measure(workload: Workload, rounds: int) -> list[CompileRow]:
    """Compile a workload's variants, cold and then warm.

    Args:
        workload: the model and its input.
        rounds: cold compiles of each variant.

    Returns:
        The rows, dense first.

    Raises:
        RuntimeError: a process failed.
    """
    cold: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    warm: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    imports: list[float] = []
    for number in range(rounds):
        for variant in VARIANTS if number % 2 == 0 else VARIANTS[::-1]:
            with tempfile.TemporaryDirectory() as cache:
                for times in (cold, warm):
                    measured = _first_step(workload, variant, cache)
                    times[variant].append(measured["compile_s"])
                    imports.append(measured["import_s"])
            print(f"compiled {workload.title}, {variant}", flush=True)
    rows: list[CompileRow] = []
    for variant in VARIANTS:
        timing = Timing.of(cold[variant])
        ratio = timing.over(Timing.of(cold[VARIANTS[0]]))
        rows.append(
            CompileRow(
                model=workload.title,
                variant=variant,
                cold_s=timing.median,
                warm_s=Timing.of(warm[variant]).median,
                ratio=ratio.median,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
                import_s=Timing.of(imports).median,
            )
        )
    return rows


def _first_step(workload: Workload, variant: str, cache: str) -> dict[str, float]:
    """Run a first step in a new process and return its times in seconds."""
    command = [sys.executable, "-m", "benchmarks.first_step"]
    command += [json.dumps(asdict(workload)), variant]
    environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    # With the user's own Triton cache, the first compile would not be cold.
    environ.pop("TRITON_CACHE_DIR", None)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured
