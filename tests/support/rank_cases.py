"""Cases for tests of several ranks: each rank runs them as a script, the test as one process.

As a script it takes a rank, the number of ranks, a folder and names of cases. It saves what each
case returns in the folder.
"""

import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile, warmup
from ssprop_fx.compiler.backend import SparseBackend
from ssprop_fx.integrations.ddp import KeptRows, kept_rows_hook

BATCH, STEPS = 8, 3
TOLD = ("module.features.layers.0", "module.head.layers.0")


class Part(nn.Module):
    """A sequence that Dynamo compiles as a whole; it may run `nn.Sequential` itself eagerly."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x) + 0


class Net(nn.Module):
    """Two parts. Its own class: Dynamo does not recompile code with a graph break per module."""

    def __init__(self, features, head):
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, x):
        return self.head(self.features(x))


def net():
    """Several kinds of layer; no batch normalisation, because its statistics are per rank."""
    torch.manual_seed(0)
    features = Part(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3, groups=2), nn.ReLU()),
        *(nn.Conv2d(48, 48, 3, groups=48), nn.Flatten()),
    )
    return Net(features, Part(nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 5))).double()


def batches(rank=0, world=1):
    """A rank's part of each global batch."""
    generator = torch.Generator().manual_seed(1)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (BATCH,), generator=generator)
        yield images[part], labels[part]


def compiled(model, drop_rate=0.6, backend="aot_eager", **config):
    config = SparsityConfig(min_channels=16, channel_multiple=1, gate=False, **config)
    schedule = drop_rate if callable(drop_rate) else constant(drop_rate)
    return ssprop_compile(model, SparsityScheduler(schedule), config=config, backend=backend)


def backward(model, images, labels):
    nn.functional.cross_entropy(model(images), labels).backward()


def gradients(model, network, rank=0, world=1):
    """Gradients of each step, by name."""
    found = []
    for images, labels in batches(rank, world):
        model.zero_grad()
        backward(network, images, labels)
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    return found


# Cases: functions `f(rank, world)` that each rank runs.


def compile_first(rank, world, **config):
    model = net()
    torch.manual_seed(rank)
    network = DistributedDataParallel(compiled(model, **{"ranks": "shared", **config}))
    return gradients(model, network, rank, world)


def ddp_first(rank, world, **config):
    model = net()
    torch.manual_seed(rank)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.02)
    network = compiled(ddp, **{"ranks": "shared", **config})
    found = gradients(model, network, rank, world)
    assert len(network.ssprop.graphs) > 1
    if config.get("telemetry"):
        # A layer in each of the graphs.
        told = network.ssprop.scheduler.telemetry()
        assert all(0 < told[name].kept_mass < 1 for name in TOLD), told
    return found


def accumulated(rank, world):
    model = net()
    network = DistributedDataParallel(compiled(model, ranks="shared"))
    *first, last = batches(rank, world)
    with network.no_sync():
        for batch in first:
            backward(network, *batch)
    backward(network, *last)
    return {name: p.grad for name, p in model.named_parameters()}


def fully_sharded(rank, world, compile_first=False):
    mesh = distributed.init_device_mesh("cpu", (world,))
    model = net()
    torch.manual_seed(rank)
    network = compiled(model, ranks="shared") if compile_first else None
    for module in (model.features, model.head, model):
        fully_shard(module, mesh=mesh)
    network = network or compiled(model, ranks="shared")
    found = gradients(model, network, rank, world)
    return [{name: grad.full_tensor() for name, grad in step.items()} for step in found]


def kept_rows(rank, world, ranks="shared", rounded=False):
    """Gradients from the hook and from the plain all-reduce, and each step's share of bytes.

    Sums of rounded gradients are exact in any order.
    """

    def hook(state, bucket):
        if rounded:
            bucket.buffer().mul_(2**20).round_().div_(2**20)
        return kept_rows_hook(state, bucket) if with_hook else allreduce_hook(None, bucket)

    found, shares = [], []
    for with_hook in (True, False):
        state = KeptRows()
        model = net().to(memory_format=torch.channels_last)
        network = compiled(model, warmup(constant(0.6), 1), ranks=ranks)
        ddp = DistributedDataParallel(network, bucket_cap_mb=0.02)
        if with_hook or rounded:
            ddp.register_comm_hook(state, hook)
        found.append([])
        for images, labels in batches(rank, world):
            model.zero_grad()
            backward(ddp, images, labels)
            found[-1].append({name: p.grad.clone() for name, p in model.named_parameters()})
            if with_hook:
                shares.append(state.sent_bytes / state.dense_bytes)
                state.sent_bytes = state.dense_bytes = 0
            network.ssprop.scheduler.step()
    return *found, shares


def disagreeing(rank, world):
    """The errors if ranks have different rates, and if only one steps its scheduler."""
    errors = []
    for drop_rate in (0.6 - 0.1 * rank, warmup(constant(0.6), 1)):
        ssprop = compiled(net(), drop_rate, ranks="shared").ssprop
        try:
            ssprop.agree()
            ssprop.agree()
            if rank == 0:
                ssprop.scheduler.step()
            ssprop.agree()
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    return errors


OPTIONS = {
    "memory": {"memory": 0.5, "block": 4},
    "l2": {"score": "l2_weight"},
    "weight": {"gradients": "weight"},
    "inductor": {"backend": "inductor"},
}
CASES = {
    "compile first": compile_first,
    "ddp first": ddp_first,
    "accumulated": accumulated,
    "fsdp first": fully_sharded,
    "compile before fsdp": partial(fully_sharded, compile_first=True),
    "disagreeing": disagreeing,
    "kept rows": kept_rows,
    "kept rows, own": partial(kept_rows, ranks="own"),
    "kept rows, rounded": partial(kept_rows, rounded=True),
    "random": partial(compile_first, select="random"),
    "sampled": partial(compile_first, select="sampled", backend="inductor"),
    **{name: partial(compile_first, **config) for name, config in OPTIONS.items()},
    "ddp first, memory": partial(ddp_first, **OPTIONS["memory"]),
    "ddp first, telemetry": partial(ddp_first, telemetry=True),
}


def run_ranks(folder: Path, *cases: str, world: int = 2) -> list[dict]:
    """Return the results of the cases, for each rank; all must end without an error."""
    common = [str(world), str(folder), *cases]
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), *common], stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    try:
        errors = [process.communicate(timeout=900)[1].decode() for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def main(rank, world, folder, *cases):
    rank, world = int(rank), int(world)
    SparseBackend._gate = lambda self: None
    # Small buckets, so that this small model has several, and so several graphs.
    distributed._DEFAULT_FIRST_BUCKET_BYTES = 5000
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=200),
    )
    results = {}
    for case in cases:
        torch._dynamo.reset()
        results[case] = CASES[case](rank, world)
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
