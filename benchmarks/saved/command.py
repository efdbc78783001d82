"""`python -m benchmarks saved`: peak memory of a training step against its time, by method.

A step is forward and backward of all parameters. All methods run in one process and take turns.

    dense       torch.compile
    budget      torch.compile with `torch._functorch.config.activation_memory_budget`: exact, the
                backward computes some activations again
    checkpoint  torch.compile with timm's `set_grad_checkpointing`: the same, block by block
    two passes  `SparsityConfig(axis="sample", saved="kept")`: some samples alone
    bf16        torch.compile under bfloat16 autocast
    pruned      weight gradients of linear layers and 1x1 convolutions from pruned inputs, of which
                the forward saves the strongest of every eight features
    time, memory  step time and peak memory over those of dense
    error         l2 norm of the difference to the dense gradient, over the norm of that gradient

The weights and images are random, so `error` compares methods; it is not that of a training.

--bytes asks Inductor's partitioner what a forward saves instead, and how much of that only weight
gradients need (`benchmarks/saved/shares.py`). It takes a minute, and compiles nothing.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.machine import describe, environment
from benchmarks.memory import peak_mib
from benchmarks.results import save, table
from benchmarks.saved.methods import METHODS, Method, make_methods
from benchmarks.saved.shares import FORMATS_OF_BYTES, measure_bytes
from benchmarks.timing import alternate
from benchmarks.workload import Workload, add_workload_arguments, workload_of

__all__ = ["SavedRow", "add_parser", "measure"]

FORMATS = {
    "method": "",
    "setting": "",
    "step_ms": ".0f",
    "time": ".2f",
    "time_low": ".2f",
    "time_high": ".2f",
    "peak_mib": ".0f",
    "memory": ".2f",
    "error": ".1e",
}


@dataclass(frozen=True, kw_only=True)
class SavedRow:
    """A method on a model; medians over rounds.

    Attributes:
        model: title of the workload.
        batch_size, img_size: images in a batch, and their height and width.
        method, setting: see `Method`.
        step_ms: time of forward and backward.
        low_ms, high_ms: its quartiles.
        time: step time over that of dense in the same round.
        time_low, time_high: its 95 % confidence interval.
        peak_mib: peak memory of the step, minus the memory before it.
        memory: peak memory over that of dense.
        error: of the gradient, see above.
        clock: `wall time` or `processor time`.
    """

    model: str
    batch_size: int
    img_size: int
    method: str
    setting: str
    step_ms: float
    low_ms: float
    high_ms: float
    time: float
    time_low: float
    time_high: float
    peak_mib: float
    memory: float
    error: float
    clock: str


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "saved",
        help="peak memory of a step against its time, by method",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_workload_arguments(parser, "vit_tiny_patch16_224", 64)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.5, 0.2])
    parser.add_argument("--drop-rates", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--kept", type=int, nargs="+", default=[4, 2], help="of every eight")
    parser.add_argument("--bytes", action="store_true", help="what is saved; no step is run")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each row")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time")
    parser.add_argument("--output", help="folder for a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table.

    Raises:
        ValueError: the device is not a CPU, for which the pruning is written.
    """
    workload = workload_of(args)
    if torch.device(workload.device).type != "cpu" or workload.backend != "inductor":
        raise ValueError("saved is for --device cpu and --backend inductor")
    if args.bytes:
        rows: Sequence[object] = measure_bytes(workload, [1.0, *args.budgets], args.kept[-1])
        name, formats = "bytes", FORMATS_OF_BYTES
    else:
        settings = args.methods, args.budgets, args.drop_rates, args.kept
        rows = measure(workload, *settings, rounds=args.rounds, with_cpu_time=args.cpu_time)
        name, formats = "saved", FORMATS
    print(f"\n{workload.title}")
    print(table(rows, formats))
    print(describe(workload.device))
    if args.output:
        save(rows, environment(workload.device), args.output, f"{name}-{workload.slug}")


def measure(
    workload: Workload,
    names: Sequence[str],
    budgets: Sequence[float],
    drop_rates: Sequence[float],
    kept: Sequence[int],
    rounds: int,
    with_cpu_time: bool = False,
) -> list[SavedRow]:
    """Measure the methods on a workload.

    Args:
        workload: the model and its input.
        names: which of METHODS.
        budgets: of torch's `activation_memory_budget`, below 1.
        drop_rates: of samples, for two passes.
        kept: features that pruning keeps of every eight.
        rounds: timed steps of each row.
        with_cpu_time: measure processor time in place of wall time.

    Returns:
        The rows, dense first.
    """
    model, images = workload.build()
    torch._dynamo.reset()
    # Every method recompiles the same code, and none may silently fall back to eager.
    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    with limits:
        methods = list(make_methods(workload, model, images, names, budgets, drop_rates, kept))
        gradients, peaks = [], []
        for method in methods:
            start = time.perf_counter()
            method.step()
            gradients.append(_gradient(method.model))
            seconds = time.perf_counter() - start
            method.model.zero_grad()
            peaks.append(peak_mib(method.run, workload.device))
            print(f"first step, {_key(method)}: {seconds:.1f} s, {peaks[-1]:.0f} MiB", flush=True)
        clock = time.process_time if with_cpu_time else time.perf_counter
        steps: dict[str, Callable[[], None]] = {_key(method): method.step for method in methods}
        timings = alternate(steps, rounds, warmup=1, clock=clock)
    dense = timings[_key(methods[0])]
    rows = []
    for method, gradient, peak in zip(methods, gradients, peaks, strict=True):
        timing = timings[_key(method)]
        ratio = timing.over(dense)
        rows.append(
            SavedRow(
                model=workload.title,
                batch_size=workload.batch_size,
                img_size=workload.img_size,
                method=method.name,
                setting=method.setting,
                step_ms=timing.median,
                low_ms=timing.low,
                high_ms=timing.high,
                time=ratio.median,
                time_low=ratio.low,
                time_high=ratio.high,
                peak_mib=peak,
                memory=peak / peaks[0],
                error=float((gradient - gradients[0]).norm() / gradients[0].norm()),
                clock="processor time" if with_cpu_time else "wall time",
            )
        )
    return rows


def _key(method: Method) -> str:
    return f"{method.name} {method.setting}"


def _gradient(model: nn.Module) -> Tensor:
    gradients = (p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters())
    return torch.cat([gradient.flatten() for gradient in gradients])
