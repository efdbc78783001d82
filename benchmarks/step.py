"""`python -m benchmarks step`: whole training steps of a model, sparse against dense.

A step is forward and backward. Rows: dense torch.compile, `ssprop_compile` at drop rate 0 (its
dense phase) and at the given drop rates, all in one process and in turn.

    bound       T_dense / (T_dense - d * T_conv_backward): what would be reached if the backward
                convolutions took exactly the share of their time that is kept
    efficiency  (T_dense - T_sparse) / (d * T_conv_backward): 1.0 reaches the bound

T_conv_backward is the time inside `aten::convolution_backward` in the dense step, by the profiler.
"""

import argparse
import time
from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import Row, save, table
from benchmarks.timing import alternate, synchronize
from ssprop_fx import SparsityConfig, SparsityScheduler, constant, join, report, ssprop_compile
from ssprop_fx.config import DEFAULT_TARGETS, TARGETS

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "step",
        help="whole training steps of a model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="resnet18", help="timm model (default: resnet18)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--drop-rates", type=float, nargs="+", default=[0.8])
    parser.add_argument("--channel-multiple", default="auto")
    parser.add_argument("--min-channels", type=int, default=SparsityConfig.min_channels)
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        default=list(DEFAULT_TARGETS),
        help="kinds of layer",
    )
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--contiguous", action="store_true", help="not channels_last")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each row")
    parser.add_argument("--output", help="folder for a CSV and a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table."""
    torch.manual_seed(0)
    memory_format = torch.contiguous_format if args.contiguous else torch.channels_last
    model = timm.create_model(args.model).to(args.device, memory_format=memory_format).train()
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    images = torch.randn(shape, device=args.device).to(memory_format=memory_format)
    rates = [0.0, *args.drop_rates]
    scheduler = SparsityScheduler(join([constant(r) for r in rates], range(1, len(rates))))
    multiple = (
        args.channel_multiple if args.channel_multiple == "auto" else int(args.channel_multiple)
    )
    config = SparsityConfig(
        channel_multiple=multiple, min_channels=args.min_channels, targets=tuple(args.targets)
    )
    dense = torch.compile(model)
    sparse = ssprop_compile(model, scheduler, config=config)

    def step(compiled: nn.Module) -> None:
        model.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            output = compiled(images)
        output.float().logsumexp(1).mean().backward()

    def step_at(index: int) -> Callable[[], None]:
        def sparse_step() -> None:
            scheduler.load_state_dict({"last_step": index})
            step(sparse)

        return sparse_step

    variants = {"dense": lambda: step(dense)}
    variants |= {f"drop {rate:g}": step_at(i) for i, rate in enumerate(rates)}
    for name, variant in variants.items():
        start = time.perf_counter()
        variant()
        synchronize()
        print(f"first step, {name}: {time.perf_counter() - start:.1f} s", flush=True)
    timings = alternate(variants, args.rounds)
    conv_backward = conv_backward_ms(variants["dense"])
    title = (
        f"{args.model} {args.img_size} b{args.batch_size}"
        f" {'bf16 autocast' if args.amp else 'fp32'}"
        f" {'contiguous' if args.contiguous else 'channels_last'}"
    )
    rows = []
    for index, (name, timing) in enumerate(timings.items()):
        rate = rates[index - 1] if index else 0.0
        scheduler.load_state_dict({"last_step": max(index - 1, 0)})
        saved = report(sparse).saved_flops / report(sparse).backward_flops if rate else 0.0
        rows.append(
            Row.of(title, name, rate, timing, timings["dense"].median, conv_backward, saved)
        )
    print(table(rows, conv_backward))
    if args.output:
        save(rows, args.output, f"step-{args.model}")


def conv_backward_ms(step: Callable[[], None], steps: int = 5) -> float:
    """Return the time a step spends inside `aten::convolution_backward`, in milliseconds."""
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        synchronize()
    name = "device_time_total" if torch.cuda.is_available() else "cpu_time_total"
    events = [e for e in profiler.key_averages() if e.key == "aten::convolution_backward"]
    return sum(getattr(e, name) for e in events) / steps / 1e3
