"""Every timm module against an oracle: coverage and error, of channels and of kept samples.

`python tests/support/sweep.py docs/coverage.md` checks all of them, each in its own process, and
writes the table. Rows go to a file as they are found; a run that was cut goes on there, and tries
failures again. `python tests/support/sweep.py --model NAME --axis AXIS` checks one and prints its
row as JSON.
"""

import argparse
import json
import multiprocessing
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import timm
import torch
from oracle import gradients, oracle_gradients, relative_error
from sample_oracle import kept_gradients, strongest
from ssprop_passes.errors import NoEffectWarning
from sweep_models import MODELS, TIED, build
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.config import TARGETS

DROP_RATE = 0.8
BATCH = 3  # batch norm over two values has no gradient except through its epsilon
SAMPLES, SAMPLES_KEPT = 5, 3
TOLERANCE = 1e-7
SAMPLES_TOLERANCE = 1e-9
# Part of it computes in float32: dense torch.compile is as far from eager.
LOOSE = {"naflexvit_base_patch16_parfac_gap": 1e-8}
# Model -> what its refusal of `axis="sample"` says: samples do not stay apart in it.
REFUSED = {"csatv2": "holds the batch in several dimensions"}
TIMEOUT_S = 1800
# Its processes start with all modules imported.
FORKS = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Row:
    """The result of one model.

    Attributes:
        model: its name in timm.
        axis: "channel" or "sample".
        size: resolution of the check.
        error: largest relative error of a gradient, NaN if the check failed.
        seconds: duration of the check.
        failure: why the check failed; "" if it did not.
        kinds: number of sparse sites by kind.
        dense: number of sites left dense by reason; of graphs whose backward stays whole.
        covered: share of the backward's floating-point operations in sparse sites.
        torch: the release that was checked.
    """

    model: str
    axis: str
    size: int = 0
    error: float = float("nan")
    seconds: float = 0.0
    failure: str = ""
    kinds: dict[str, int] | None = None
    dense: dict[str, int] | None = None
    covered: float = 0.0
    torch: str = torch.__version__


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().sum()


def takes_part(module: nn.Module, name: str) -> bool:
    return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)


def check_channels(name: str) -> Row:
    """Compare a model's sparse gradients under AOT eager with the oracle's."""
    start = time.perf_counter()
    model, inputs = build(name, BATCH)
    tied = TIED.get(name)

    def takes_part_untied(module: nn.Module, layer: str) -> bool:
        return takes_part(module, layer) and (tied is None or tied not in layer)

    expected = oracle_gradients(model, inputs, DROP_RATE, takes_part_untied, loss)
    config = SparsityConfig(
        channel_multiple=1, min_channels=1, filter_fn=takes_part_untied, targets=TARGETS
    )
    scheduler = SparsityScheduler(constant(DROP_RATE))
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    inputs.requires_grad_()
    loss(compiled(inputs)).backward()
    made = report(compiled)
    return Row(
        model=name,
        axis="channel",
        size=inputs.shape[-1],
        error=relative_error(gradients(model, inputs), expected),
        seconds=time.perf_counter() - start,
        kinds=dict(Counter(site.kind for site in made.sparse_sites)),
        dense=dict(Counter(site.reason for site in made.sites if site.reason)),
        covered=sum(site.flops for site in made.sparse_sites) / made.backward_flops,
    )


def choose_strongest(output_gradients: list[Tensor]) -> Tensor:
    return strongest(output_gradients, SAMPLES_KEPT)


def check_samples(name: str) -> Row:
    """Compare the gradients of the kept samples under AOT eager with the eager reference's."""
    start = time.perf_counter()
    model, inputs = build(name, SAMPLES)
    inputs.requires_grad_()
    expected = kept_gradients(model, (inputs,), loss, choose_strongest, SAMPLES)
    model.zero_grad()
    scheduler = SparsityScheduler(constant(1 - SAMPLES_KEPT / SAMPLES))
    config = SparsityConfig(axis="sample")
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffectWarning)
        loss(compiled(inputs)).backward()
    said = next((str(w.message) for w in caught if w.category is NoEffectWarning), "")
    whole, graphs = map(int, re.findall(r"\d+", said)[:2]) if said else (0, 1)
    if whole == graphs:
        return Row(name, "sample", failure=said)
    found = gradients(model, inputs)
    found["input 0"] = found.pop("inputs")
    return Row(
        model=name,
        axis="sample",
        size=inputs.shape[-1],
        error=relative_error(found, expected),
        seconds=time.perf_counter() - start,
        dense={f"of {graphs} graphs whole": whole} if whole else {},
    )


CHECKS = {"sample": check_samples, "channel": check_channels}


def check_apart(name: str, axis: str) -> Row:
    """Check a model in its own process, so that a crash or a hang becomes a row as well."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=send_row, args=(sender, name, axis))
    process.start()
    sender.close()
    if not receiver.poll(TIMEOUT_S):
        process.kill()
        return Row(name, axis, failure=f"more than {TIMEOUT_S} s")
    try:
        row: Row = receiver.recv()
    except EOFError:
        process.join()
        return Row(name, axis, failure=f"exit code {process.exitcode}")
    process.join()
    return row


def send_row(sender: Connection, name: str, axis: str) -> None:
    # One thread each: processes that spin on the same cores slow each other down.
    torch.set_num_threads(1)
    try:
        row = CHECKS[axis](name)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        row = Row(name, axis, failure=f"{type(error).__name__}: {lines[-1][:300]}")
    sender.send(row)


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """Return the rows of a file by model and axis; the last of equal ones counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (Row(**json.loads(line)) for line in lines)
    return {(row.model, row.axis): row for row in rows}


def outcome(row: Row | None) -> str:
    """Return the cell of a check's error."""
    if row is None:
        return "not checked"
    if row.axis == "sample" and REFUSED.get(row.model, "\n") in row.failure:
        return f"refused: {REFUSED[row.model]}"
    whole = [f", {n} {what}" for what, n in (row.dense or {}).items() if row.axis == "sample"]
    return row.failure or f"{row.error:.1e}{''.join(whole)}"


def releases(rows: Mapping[tuple[str, str], Row], axis: str) -> str:
    """Return the releases of torch on which an axis was checked."""
    return " and ".join(sorted({row.torch for row in rows.values() if row.axis == axis}))


def markdown(rows: Mapping[tuple[str, str], Row]) -> str:
    """Return the coverage table."""
    lines = [
        "# Coverage of timm",
        "",
        f"This page checks at least one model of every module of timm {timm.__version__}, under"
        " AOT eager in float64, at the smallest resolution that the model accepts. Dropout and drop"
        " path are off. Noise moves parameters off their special initial values (zero, or the 1e-6"
        " of a layer scale).",
        "",
        "- *Channels*: the gradients of all parameters and of the input against dense eager"
        " back-propagation, in which the unselected channels of each layer's output gradient are"
        f" masked. Drop rate {DROP_RATE}, batch {BATCH}. Every layer takes part"
        " (`min_channels=1`, including the classifier). *Covered* is the share of the backward's"
        " floating-point operations, at that resolution, in sparse sites; the rest is mostly"
        " products of activations in attention.",
        f'- *Kept samples*: the same gradients with `axis="sample"`, {SAMPLES_KEPT} of {SAMPLES}'
        " samples kept, against an eager backward of those samples. Batch norms, in training mode,"
        " sum over the kept samples alone.",
        "",
        "`python tests/support/sweep.py docs/coverage.md` wrote this page. Channels were checked"
        f" with torch {releases(rows, 'channel')}, kept samples with torch"
        f" {releases(rows, 'sample')}.",
        "",
        *(f"`{layer}` of {name} stays dense: its channels tie." for name, layer in TIED.items()),
        "",
        "| timm module | model | size | sparse sites | left dense | covered"
        " | max. rel. error, channels | max. rel. error, kept samples |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for module, names in sorted(MODELS.items()):
        for name in names:
            row = rows.get((name, "channel"), Row(name, "channel", failure="not checked"))
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted((row.kinds or {}).items()))
            dense = ", ".join(f"{n}: {why}" for why, n in sorted((row.dense or {}).items()))
            lines.append(
                f"| {module} | {name} | {row.size or ''} | {kinds} | {dense} | {row.covered:.0%}"
                f" | {outcome(row)} | {outcome(rows.get((name, 'sample')))} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", type=Path, help="file for the table")
    parser.add_argument("--model", help="check this one and print its row")
    parser.add_argument("--axis", choices=CHECKS, default="channel", help="what --model checks")
    parser.add_argument("--rows", type=Path, default="build/coverage.jsonl", help="file of rows")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel processes")
    args = parser.parse_args()
    if args.model:
        print(json.dumps(asdict(CHECKS[args.axis](args.model))))
        return
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    found = read_rows(args.rows)
    every = [(name, axis) for axis in CHECKS for names in MODELS.values() for name in names]
    with ThreadPoolExecutor(args.jobs) as pool, args.rows.open("a") as file:
        todo = [key for key in every if key not in found or found[key].failure]
        for row in pool.map(lambda key: check_apart(*key), todo):
            print(row, flush=True)
            print(json.dumps(asdict(row)), file=file, flush=True)
            found[row.model, row.axis] = row
    args.output.write_text(markdown(found))


if __name__ == "__main__":
    main()
