"""`python -m benchmarks breakdown`: where the time of a step goes, dense and sparse.

Parts: the forward; the backward's convolutions, matrix products and top-k; and the rest. The rest
is Inductor's own kernels and the code that calls them; in a sparse step these kernels also compute
scores, gathers and scatters.

A profiler slows down steps that allocate large buffers, so this benchmark uses none. It replaces
the operators in Inductor's code by timed ones.
"""

import argparse
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.codecache import PyCodeCache

from benchmarks.configs import NAME, add_config_arguments, configs_of
from benchmarks.machine import environment
from benchmarks.results import save, table
from benchmarks.timing import synchronize
from benchmarks.variants import DENSE, Variant, make_variants
from benchmarks.workload import Workload, add_workload_arguments, workload_of
from ssprop_fx import SparsityConfig

__all__ = ["BreakdownRow", "add_parser", "measure"]

# Operator -> field of BreakdownRow.
_OPERATORS = {
    "aten.convolution_backward": "conv_ms",
    "ssprop.conv_backward": "conv_ms",
    "aten.topk": "topk_ms",
}
_PRODUCTS = ("mm", "addmm", "bmm")
_FORMATS = {
    "model": "",
    "variant": "",
    "drop_rate": "g",
    "step_ms": ".1f",
    "forward_ms": ".1f",
    "conv_ms": ".1f",
    "product_ms": ".1f",
    "topk_ms": ".1f",
    "rest_ms": ".1f",
}


@dataclass(frozen=True)
class BreakdownRow:
    """Where the time of one variant's step goes: medians, in milliseconds.

    Attributes:
        model: name, resolution, batch, precision, layout.
        variant: `dense` or the name of the sparse configuration.
        drop_rate: fraction of channels left out.
        step_ms: forward and backward.
        forward_ms: the forward.
        conv_ms: the backward's convolutions.
        product_ms: the backward's matrix products.
        topk_ms: the backward's choice of channels.
        rest_ms: the rest of the backward.
    """

    model: str
    variant: str
    drop_rate: float
    step_ms: float
    forward_ms: float
    conv_ms: float
    product_ms: float
    topk_ms: float
    rest_ms: float


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "breakdown",
        help="where the time of a step goes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload_arguments(parser)
    add_config_arguments(parser)
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each row")
    parser.add_argument("--output", help="folder for a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table."""
    workload = workload_of(args)
    rows = measure(workload, configs_of(args)[NAME], args.drop_rate, args.rounds)
    print(table(rows, _FORMATS))
    if args.output:
        save(rows, environment(args.device), args.output, f"breakdown-{workload.slug}")


def measure(
    workload: Workload, config: SparsityConfig, drop_rate: float, rounds: int
) -> list[BreakdownRow]:
    """Measure a workload's dense and sparse step by part.

    Args:
        workload: the model and its input.
        config: configuration of the sparse variant.
        drop_rate: drop rate of the sparse variant.
        rounds: timed steps of each variant.

    Returns:
        Two rows, dense first.
    """
    model, images = workload.build()
    torch._dynamo.reset()
    made = make_variants(workload, model, images, {NAME: config}, [drop_rate], with_peers=False)
    variants = [v for v in made if v.name == DENSE or v.drop_rate]
    for variant in variants * 2:
        variant.step()
    times: dict[str, list[Counter[str]]] = defaultdict(list)
    for _ in range(rounds):
        for variant in variants:
            times[variant.name].append(_timed_step(variant))
    rows = []
    for variant in variants:
        parts = {
            field: statistics.median(counted[field] for counted in times[variant.name])
            for field in BreakdownRow.__dataclass_fields__
            if field.endswith("_ms")
        }
        rows.append(BreakdownRow(workload.title, variant.name, variant.drop_rate, **parts))
    return rows


def _timed_step(variant: Variant) -> Counter[str]:
    """Run one step and return the time of each part."""
    counted: Counter[str] = Counter()
    variant.model.zero_grad()
    synchronize()
    start = time.perf_counter()
    with _backward_timed(counted, start):
        variant.run()
        synchronize()
    counted["step_ms"] = 1e3 * (time.perf_counter() - start)
    inside = sum(counted[field] for field in ("forward_ms", "conv_ms", "product_ms", "topk_ms"))
    counted["rest_ms"] = counted["step_ms"] - inside
    return counted


@contextmanager
def _backward_timed(counted: Counter[str], start: float) -> Iterator[None]:
    """Time the forward, and the operators that compiled code calls after `backward` starts."""

    def timed(function: Callable[..., Any], field: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "forward_ms" not in counted:
                return function(*args, **kwargs)
            synchronize()
            before = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            counted[field] += 1e3 * (time.perf_counter() - before)
            return result

        return call

    def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        synchronize()
        counted["forward_ms"] = 1e3 * (time.perf_counter() - start)
        real_backward(tensor, *args, **kwargs)

    real_backward = torch.Tensor.backward
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.Tensor, "backward", backward))
        for name, field in _OPERATORS.items():
            namespace, operator = name.split(".")
            packet = getattr(getattr(torch.ops, namespace), operator)
            replaced = timed(packet.default, field)
            stack.enter_context(patch.object(packet, "default", replaced))
        for kernels in {id(m.extern_kernels): m.extern_kernels for m in _modules()}.values():
            for name in _PRODUCTS:
                replaced = timed(getattr(kernels, name), "product_ms")
                stack.enter_context(patch.object(kernels, name, replaced))
        yield


def _modules() -> list[Any]:
    """Return the modules that Inductor generated."""
    return [module for module in PyCodeCache.modules if hasattr(module, "extern_kernels")]
