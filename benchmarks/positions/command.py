"""`python -m benchmarks positions`: whole steps whose gradients come from some positions.

A step is forward and backward. The rows are dense torch.compile; rows (`positions/rows.py`) at the
given drop rates; patches of 2 x 2 (`positions/patches.py`), of all convolutions and of 1x1
convolutions alone; kept samples (`axis="sample"`), alone and with rows inside them. All run in one
process and take turns. --products measures the weight gradients of all layers alone
(`positions/products.py`), which needs no compiler.

Patches are for images, so a model without convolutions inside has no such rows.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe, environment
from benchmarks.phases import CLOCKS
from benchmarks.positions.patches import is_patch_conv, swap_patches
from benchmarks.positions.products import FORMATS_OF_PRODUCTS, measure_products
from benchmarks.positions.rows import swap_rows
from benchmarks.results import save, table
from benchmarks.timing import Timing, alternate
from benchmarks.variants import DENSE, Variant, sparse_variants
from benchmarks.workload import Workload, add_workload_arguments, workload_of
from ssprop_fx import SparsityConfig, SparsityScheduler, constant, join, ssprop_compile

__all__ = ["PositionRow", "add_parser", "measure"]

FORMATS = {
    "model": "",
    "variant": "",
    "drop_rate": ".2f",
    "step_ms": ".1f",
    "speedup": ".2f",
    "speedup_low": ".2f",
    "speedup_high": ".2f",
}

_KINDS = ("rows", "patches", "samples")

_SAMPLES = SparsityConfig(axis="sample", select="sampled")

# Models with fewer convolutions have no rows of patches.
_FEWEST_CONVS = 3


@dataclass(frozen=True, kw_only=True)
class PositionRow:
    """One variant of one model; medians over rounds.

    Attributes:
        model: name, resolution, batch, precision, layout.
        variant: name of the variant.
        drop_rate: share of the rows, or of the samples, left out.
        step_ms: milliseconds of forward and backward.
        speedup: dense time over this time in each round, its median.
        speedup_low, speedup_high: its 95 % confidence interval.
        clock: what was measured.
    """

    model: str
    variant: str
    drop_rate: float
    step_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    clock: str


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "positions",
        help="gradients from some rows, or from averages over patches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload_arguments(parser)
    parser.add_argument("--drop-rates", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--products", action="store_true", help="weight gradients alone")
    parser.add_argument("--variants", nargs="+", choices=_KINDS, default=_KINDS, metavar="KIND")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each row")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time")
    parser.add_argument("--output", help="folder for a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table."""
    workload = workload_of(args)
    if workload.amp:
        raise ValueError("positions measures float32 alone; leave --amp out")
    rows: list[Any]
    if args.products:
        clock = CLOCKS["processor time" if args.cpu_time else "wall time"]
        rows = measure_products(workload, args.drop_rates, args.rounds, clock)
    else:
        rows = measure(workload, args.drop_rates, args.rounds, args.cpu_time, args.variants)
    print(table(rows, FORMATS_OF_PRODUCTS if args.products else FORMATS))
    print(describe(workload.device))
    if args.output:
        name = "products" if args.products else "positions"
        save(rows, environment(workload.device), args.output, f"{name}-{workload.slug}")


def measure(
    workload: Workload,
    drop_rates: list[float],
    rounds: int,
    with_cpu_time: bool = False,
    kinds: Sequence[str] = _KINDS,
) -> list[PositionRow]:
    """Measure every variant of a workload's step.

    Args:
        workload: the model and its input.
        drop_rates: shares of rows, and of samples, to leave out.
        rounds: timed steps of each variant.
        with_cpu_time: measure processor time in place of wall time.
        kinds: which of `rows`, `patches` and `samples` to measure beside the dense step.

    Returns:
        The rows, dense first.
    """
    model, images = workload.build()
    torch._dynamo.reset()
    # Every variant compiles the same code anew, and none may silently fall back to eager.
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with limits:
        variants = list(_variants(workload, model, images, drop_rates, kinds))
        for variant in variants:
            start = time.perf_counter()
            variant.step()
            print(f"first step, {variant.key}: {time.perf_counter() - start:.1f} s", flush=True)
        clock = CLOCKS["processor time" if with_cpu_time else "wall time"]
        timings = alternate({v.key: v.step for v in variants}, rounds, warmup=1, clock=clock)
    dense: Timing = timings[variants[0].key]

    def row(variant: Variant) -> PositionRow:
        speedup = dense.over(timings[variant.key])
        return PositionRow(
            model=workload.title,
            variant=variant.name,
            drop_rate=variant.drop_rate,
            step_ms=timings[variant.key].median,
            speedup=speedup.median,
            speedup_low=speedup.low,
            speedup_high=speedup.high,
            clock="processor time" if with_cpu_time else "wall time",
        )

    return [row(variant) for variant in variants]


def _variants(
    workload: Workload,
    model: nn.Module,
    images: Tensor,
    drop_rates: list[float],
    kinds: Sequence[str],
) -> Iterator[Variant]:
    def compiled(changed: nn.Module) -> Callable[[], None]:
        fast = torch.compile(changed, backend=workload.backend)
        return lambda: workload.step(fast, images)

    def samples(name: str, changed: nn.Module) -> Iterator[Variant]:
        scheduler = SparsityScheduler(join([*map(constant, drop_rates)], range(1, len(drop_rates))))
        fast = ssprop_compile(changed, scheduler, config=_SAMPLES, backend=workload.backend)
        return sparse_variants(workload, changed, images, name, drop_rates, scheduler, fast)

    yield Variant(DENSE, 0.0, model, compiled(model))
    if "rows" in kinds:
        share = torch.ones(())
        changed = swap_rows(copy.deepcopy(model), share)
        step = compiled(changed)
        for rate in drop_rates:
            yield Variant("rows", rate, changed, partial(_with_share, share, 1 - rate, step))
    has_patches = sum(map(is_patch_conv, model.modules())) >= _FEWEST_CONVS
    if "patches" in kinds and has_patches:
        for name, only_1x1 in (("patches", False), ("patches 1x1", True)):
            changed = swap_patches(copy.deepcopy(model), 2, only_1x1=only_1x1)
            yield Variant(name, 0.75, changed, compiled(changed))
    if "samples" in kinds:
        yield from samples("samples", model)
        yield from samples("samples, half of their rows", swap_rows(copy.deepcopy(model), 0.5))


def _with_share(share: Tensor, value: float, step: Callable[[], None]) -> None:
    share.fill_(value)
    step()
