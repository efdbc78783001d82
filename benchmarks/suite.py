"""`python -m benchmarks suite`: every benchmark for a device, one after another.

Each run has its own process. If one fails, the others still run; at the end the suite lists the
failures and exits with status 1.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import torch

__all__ = ["add_parser", "commands", "run_all"]

# Model, resolution, batch size, whether to use bfloat16.
CPU = (
    ("resnet50", 224, 16, False),
    ("resnet50", 224, 16, True),
    ("resnet18", 64, 64, False),
    ("vgg16", 224, 8, False),
    ("regnety_008", 224, 16, False),
    ("convnext_atto", 224, 16, False),
)
# Batch sizes that fill a GPU of 80 GB or more.
CUDA = (
    ("resnet50", 224, 256, True),
    ("convnext_tiny", 224, 256, True),
    ("efficientnet_b0", 224, 256, True),
    ("regnety_016", 224, 256, True),
    ("vit_small_patch16_224", 224, 256, True),
    ("vgg16", 224, 128, True),
)
KINDS = ("step", "compile", "scaling", "layer")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "suite",
        help="every benchmark for a device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True, help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--models", nargs="+", help="only these models")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the suite."""
    wanted = [
        command
        for command in commands(args.device, args.output)
        if command[0] in args.only
        and (not args.models or any(model in command for model in args.models))
    ]
    if args.dry_run:
        print("\n".join(shlex.join(["python", "-m", "benchmarks", *c]) for c in wanted))
        return
    sys.exit(run_all([[sys.executable, "-m", "benchmarks", *command] for command in wanted]))


def commands(device: str, folder: str) -> Iterator[list[str]]:
    """Yield the arguments of every run, the most important first.

    Args:
        device: device to run on.
        folder: folder for the results.
    """
    where = ["--device", device, "--output", folder]
    models = CUDA if torch.device(device).type == "cuda" else CPU
    workloads = [
        ["--img-size", str(size), "--batch-size", str(batch), *["--amp"] * bf16, *where]
        for _, size, batch, bf16 in models
    ]
    for (model, *_), workload in zip(models, workloads, strict=True):
        yield ["step", "--model", model, "--drop-rates", "0.5", "0.8", "--peers", *workload]
    yield ["compile", "--models", models[0][0], *workloads[0]]
    for index, ((model, size, batch, _), workload) in enumerate(
        zip(models, workloads, strict=True)
    ):
        # Only the first model also varies batch size and resolution.
        batches = ["--batch-sizes", str(batch // 4), str(batch // 2)] * (not index)
        sizes = ["--img-sizes", str(size // 2), str(size * 3 // 4)] * (not index)
        yield ["scaling", "--model", model, *workload, *batches, *sizes]
    _, _, batch, bf16 = models[0]
    yield ["layer", "--batch-size", str(batch), *["--amp"] * bf16, *where]


def run_all(runs: Sequence[Sequence[str]]) -> int:
    """Run all commands in order, even after one fails.

    Args:
        runs: the commands.

    Returns:
        Exit status: 1 if any failed, else 0.
    """
    failed = []
    for index, command in enumerate(runs):
        print(f"\n[{index + 1}/{len(runs)}] {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        status = subprocess.run(command, check=False).returncode
        print(f"exit status {status} after {time.perf_counter() - start:.0f} s", flush=True)
        if status:
            failed.append(command)
    print(f"\n{len(runs) - len(failed)} of {len(runs)} runs succeeded")
    for command in failed:
        print(f"failed: {shlex.join(command)}")
    return 1 if failed else 0
