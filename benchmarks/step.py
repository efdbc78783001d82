"""`python -m benchmarks step`: whole training steps of a model, sparse against dense.

A step is forward and backward. The rows are dense torch.compile, and `ssprop_compile` at drop rate
0 (its dense phase) and at the given drop rates, in each configuration (--variant). --peers adds
eager dense, dense with the kernels of a sparse step, and the module swap of the published code,
eager and compiled. All run in one process and take turns.

    bound       T_dense / (T_dense - d * T_backward): the speed-up if dropping the share d of the
                channels saved exactly that share of the backward's time
    efficiency  (T_dense - T_sparse) / (d * T_backward): 1.0 reaches the bound
    speedup     T_dense / T in each round, where both runs are close in time: the median of the
                rounds, and its 95 % confidence interval by the bootstrap
    over_plain  T / T of the first configuration, likewise: the cost of a --variant

With --axis sample the rows and columns are those of `benchmarks/samples.py`.

The profiler measures T_backward: the time of the dense step inside `aten::convolution_backward` and
inside the backward products of the linear layers that take part.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks import samples
from benchmarks.backward_time import ProfiledStep, linear_products
from benchmarks.configs import add_config_arguments, configs_of, variants_of
from benchmarks.machine import describe, environment
from benchmarks.memory import peak_mib
from benchmarks.results import save, table
from benchmarks.step_row import FORMATS, FORMATS_OF_VARIANTS, StepRow
from benchmarks.timing import alternate, synchronize
from benchmarks.variants import make_variants
from benchmarks.workload import Workload, add_workload_arguments, workload_of
from ssprop_fx import SparsityConfig
from ssprop_fx.compiler.slots import find_slots

__all__ = ["add_parser", "measure"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "step",
        help="whole training steps of a model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload_arguments(parser)
    add_config_arguments(parser)
    parser.add_argument(
        "--axis",
        choices=("channel", "sample"),
        default="channel",
        help="what a backward leaves out",
    )
    parser.add_argument("--other-checkout", help="with --axis sample: a checkout to compare with")
    parser.add_argument(
        "--rule",
        action="store_true",
        help="with --axis sample: add a rule that keeps as many samples",
    )
    parser.add_argument("--drop-rates", type=float, nargs="+", default=[0.8])
    parser.add_argument("--peers", action="store_true", help="add eager and the module swap")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each row")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="measure processor time instead of wall time: for a shared CPU; best with"
        " OMP_NUM_THREADS=1",
    )
    parser.add_argument("--output", help="folder for a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table."""
    workload = workload_of(args)
    if args.cpu_time and torch.device(workload.device).type != "cpu":
        raise ValueError(f"--cpu-time is for --device cpu, got {workload.device}")
    if args.axis == "sample":
        _run_samples(workload, args)
        return
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = measure(workload, configs_of(args), args.drop_rates, args.rounds, args.peers, clock)
    if args.output:
        save(rows, environment(args.device), args.output, f"step-{workload.slug}")


def _run_samples(workload: Workload, args: argparse.Namespace) -> None:
    rates = _above_0(args.drop_rates)
    configs = samples.CONFIGS | variants_of(args.variant, samples.CONFIGS["sliced"], "sliced")
    clock = "processor time" if args.cpu_time else "wall time"
    rows = samples.measure(
        workload,
        rates,
        args.rounds,
        configs,
        args.peers,
        clock,
        args.other_checkout,
        args.rule,
    )
    if args.output:
        save(rows, environment(args.device), args.output, f"samples-{workload.slug}")


def measure(
    workload: Workload,
    configs: Mapping[str, SparsityConfig],
    drop_rates: Sequence[float],
    rounds: int,
    with_peers: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[StepRow]:
    """Measure every variant of a workload's step and print the table.

    Args:
        workload: the model and its input.
        configs: configurations of the sparse variants, by name, the plain one first.
        drop_rates: drop rates of the sparse variants; 0, the dense phase, is always measured.
        rounds: timed steps of each row.
        with_peers: add the peers.
        clock: returns seconds.

    Returns:
        The rows, dense first.

    Raises:
        ValueError: no drop rate is above 0.
    """
    rates = _above_0(drop_rates)
    model, images = workload.build()
    torch._dynamo.reset()
    # Every variant recompiles the same code, and none may silently fall back to eager.
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with limits:
        variants = make_variants(workload, model, images, configs, rates, with_peers)
        for variant in variants:
            start = time.perf_counter()
            variant.step()
            synchronize()
            print(f"first step, {variant.key}: {time.perf_counter() - start:.1f} s", flush=True)
        names = [slot.name for slot in find_slots(model, next(iter(configs.values()))).slots]
        products = linear_products(model, names, lambda: workload.step(model, images))
        profiled = ProfiledStep(variants[0].step, products, workload.device)
        steps = {variant.key: variant.step for variant in variants} | {"profiled": profiled}
        timings = alternate(steps, rounds, clock=clock)
        dense = timings[variants[0].key]
        backward = profiled.of(dense.median)
        plain = next(iter(configs))
        by_rate = {v.drop_rate: timings[v.key] for v in variants if v.name == plain}
        rows = []
        for variant in variants:
            variant.model.zero_grad()
            rows.append(
                StepRow.of(
                    workload,
                    variant.name,
                    variant.drop_rate,
                    timings[variant.key],
                    dense,
                    backward,
                    variant.saved_flops(),
                    peak_mib(variant.run, workload.device),
                    by_rate.get(variant.drop_rate) if variant.name in configs else None,
                )
            )
    print(f"\n{workload.title}: {backward}")
    print(table(rows, FORMATS_OF_VARIANTS if len(configs) > 1 else FORMATS))
    print(describe(workload.device))
    return rows


def _above_0(drop_rates: Sequence[float]) -> list[float]:
    rates = [rate for rate in drop_rates if rate]
    if not rates:
        raise ValueError(f"--drop-rates must have one above 0, got {list(drop_rates)}")
    return rates
