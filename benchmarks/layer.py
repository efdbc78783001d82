"""`python -m benchmarks layer`: the backward of single layers, whole and by part.

    dense     backward of the layer under torch.compile
    sparse    backward of the layer under ssprop_compile, with all its parts
    reduced   only the reduced convolution or the two reduced products
    score     l2 norm of each channel of grad_output
    select    the k largest
    gather    the selected channels of grad_output and rows of the weight
    scatter   the rows of the weight's gradient into zeros

Gain is dense over sparse; the ideal gain is C / k. Each part is compiled alone, with k as a
constant; in a model the parts fuse with each other and with the operations around the layer. The
backward of a depthwise convolution also gathers its input and scatters the input's gradient.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.configs import parse_overrides
from benchmarks.layer_parts import PARTS, Setting, WholeBackward, make_parts
from benchmarks.layers import TYPICAL, Layer, collect_layers
from benchmarks.machine import describe, environment
from benchmarks.results import save, table
from benchmarks.timing import alternate
from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.compiler.backend import BACKENDS
from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.config import TARGETS
from ssprop_fx.scheduling.keep_counts import keep_count

__all__ = ["LayerRow", "add_parser", "measure"]

FORMATS = {"layer": "", "shape": "", "calls": "", "drop_rate": ".2f", "channels": "", "kept": ""}
FORMATS |= {f"{name}_ms": ".3f" for name in ("dense", "sparse", *PARTS)}
FORMATS |= {"gain": ".2f", "ideal_gain": ".2f"}


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """The backward of one layer at one drop rate; medians, in milliseconds.

    Attributes:
        layer, shape: its name; its channels, kernel and input size.
        calls: how often the model calls layers of this shape.
        drop_rate: fraction of channels left out.
        channels, kept: output channels, C, and number of them that are kept, k.
        dense_ms, sparse_ms: the whole backward.
        reduced_ms, score_ms, select_ms, gather_ms, scatter_ms: its parts.
        gain: dense over sparse.
        ideal_gain: C / k.
    """

    layer: str
    shape: str
    calls: int
    drop_rate: float
    channels: int
    kept: int
    dense_ms: float
    sparse_ms: float
    reduced_ms: float
    score_ms: float
    select_ms: float
    gather_ms: float
    scatter_ms: float
    gain: float
    ideal_gain: float


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this benchmark to the command line."""
    parser = subparsers.add_parser(
        "layer",
        help="single layers, whole and by part",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only layers with this text in their name or shape",
    )
    parser.add_argument("--model", help="layers of this timm model instead of the typical ones")
    parser.add_argument("--img-size", type=int, default=224, help="input size of the model")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--drop-rates", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--amp", action="store_true", help="bfloat16 tensors")
    parser.add_argument("--contiguous", action="store_true", help="not channels_last")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--variant", help="fields of SparsityConfig, as in `step`")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each part")
    parser.add_argument("--output", help="folder for a JSON file of the rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the benchmark and print its table.

    Raises:
        ValueError: no layer matches `--layers`.
    """
    found = collect_layers(args.model, args.img_size) if args.model else TYPICAL
    layers = [
        x for x in found if not args.layers or any(t in f"{x.name} {x.shape}" for t in args.layers)
    ]
    if not layers:
        names = [f"{layer.name} {layer.shape}" for layer in found]
        raise ValueError(f"--layers must be part of one of {names}, got {args.layers}")
    dtype = torch.bfloat16 if args.amp else torch.float32
    setting = Setting(args.batch_size, dtype, args.contiguous, args.device, args.backend)
    overrides = parse_overrides(args.variant) if args.variant else {}
    config = SparsityConfig(**{"min_channels": 1, "targets": TARGETS, **overrides})
    rows = []
    for layer in layers:
        rows += measure(layer, setting, config, args.drop_rates, args.rounds)
        print(f"measured {layer.name}", flush=True)
    print(table(rows, FORMATS))
    print(describe(args.device))
    if args.output:
        precision = "bf16" if args.amp else "fp32"
        name = f"layer-{args.model or 'typical'}-b{args.batch_size}-{precision}"
        save(rows, environment(args.device), args.output, name)


def measure(
    layer: Layer,
    setting: Setting,
    config: SparsityConfig,
    drop_rates: Sequence[float],
    rounds: int,
) -> list[LayerRow]:
    """Measure one layer, with both gradients of its backward.

    Args:
        layer: the layer.
        setting: how to run it.
        config: configuration of the sparse variant; the layer must take part.
        drop_rates: drop rates above 0.
        rounds: timed runs of each part.

    Returns:
        One row per drop rate.
    """
    module, input = setting.build(layer)
    slot = find_slots(module, config).slots[0]
    grad_output = torch.randn_like(module(input))
    rows = []
    for rate in drop_rates:
        torch._dynamo.reset()
        k = keep_count(slot.channels, rate, config.channel_multiple, slot.groups)
        scheduler = SparsityScheduler(constant(rate))
        sparse = ssprop_compile(module, scheduler, config=config, backend=setting.backend)
        dense = torch.compile(module, backend=setting.backend)
        wholes = {
            "dense": WholeBackward(dense, input, grad_output),
            "sparse": WholeBackward(sparse, input, grad_output),
        }
        parts = make_parts(module, input, grad_output, k, setting.backend)
        timings = alternate(
            {name: whole.run for name, whole in wholes.items()} | parts,
            rounds,
            prepare={name: whole.prepare for name, whole in wholes.items()},
        )
        medians = {f"{name}_ms": timing.median for name, timing in timings.items()}
        rows.append(
            LayerRow(
                layer=layer.name,
                shape=layer.shape,
                calls=layer.calls,
                drop_rate=rate,
                channels=slot.channels,
                kept=k * slot.groups,
                gain=medians["dense_ms"] / medians["sparse_ms"],
                ideal_gain=slot.channels / (k * slot.groups),
                **medians,
            )
        )
    return rows
