"""The variants of a step: dense, sparse in each configuration, and the peers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.dense_kernels import dense_kernels
from benchmarks.peers import TopKConv2d, swap_convs
from benchmarks.workload import Workload
from ssprop_fx import (
    Report,
    SparsityConfig,
    SparsityScheduler,
    constant,
    join,
    report,
    ssprop_compile,
)

__all__ = ["DENSE", "DENSE_PEERS", "PEERS", "Variant", "make_variants", "sparse_variants"]

DENSE = "dense"
# Rows to compare with: dense eager, the module swap, and dense torch.compile with the kernels of a
# sparse step, which shows how much these kernels gain.
DENSE_PEERS = ("eager", "dense own kernels")
PEERS = (*DENSE_PEERS, "module swap eager", "module swap compiled")


@dataclass(frozen=True)
class Variant:
    """One way to run a step.

    Attributes:
        name: name of its row.
        drop_rate: fraction of channels left out.
        model: the module whose parameters get the gradients.
        run: runs forward and backward.
        saved_flops: returns the share of the backward's operations left out; call it after `run`.
    """

    name: str
    drop_rate: float
    model: nn.Module
    run: Callable[[], None]
    saved_flops: Callable[[], float] = lambda: 0.0

    @property
    def key(self) -> str:
        """Name and drop rate."""
        return f"{self.name} {self.drop_rate:g}"

    def step(self) -> None:
        """Run one step."""
        self.model.zero_grad()
        self.run()


def make_variants(
    workload: Workload,
    model: nn.Module,
    images: Tensor,
    configs: Mapping[str, SparsityConfig],
    drop_rates: Sequence[float],
    with_peers: bool,
) -> list[Variant]:
    """Return the variants, dense torch.compile first.

    Args:
        workload: the workload that built `model` and `images`.
        model: the model; peers that change it get copies.
        images: a batch.
        configs: configurations of the sparse variants, by name. The first one also gets a row at
            drop rate 0, its dense phase, and its report gives the peers' operation counts.
        drop_rates: drop rates of the sparse variants, each above 0.
        with_peers: add the peers.
    """
    dense = torch.compile(model, backend=workload.backend)
    variants = [Variant(DENSE, 0.0, model, lambda: workload.step(dense, images))]
    reports: list[Callable[[], Report]] = []
    for index, (name, config) in enumerate(configs.items()):
        rates = drop_rates if index else [0.0, *drop_rates]
        scheduler = SparsityScheduler(join([constant(r) for r in rates], range(1, len(rates))))
        compiled = ssprop_compile(model, scheduler, config=config, backend=workload.backend)
        variants += sparse_variants(workload, model, images, name, rates, scheduler, compiled)
        reports.append(lambda compiled=compiled: report(compiled))
    if with_peers:
        variants += _peers(workload, model, images, drop_rates, reports[0])
    return variants


def sparse_variants(
    workload: Workload,
    model: nn.Module,
    images: Tensor,
    name: str,
    rates: Sequence[float],
    scheduler: SparsityScheduler,
    compiled: nn.Module,
) -> Iterator[Variant]:
    """Return a variant of one compiled model for each drop rate.

    Args:
        workload: the workload that built `model` and `images`.
        model: the model.
        images: a batch.
        name: name of the rows.
        rates: the drop rates, in the order of the scheduler's steps.
        scheduler: the scheduler of `compiled`.
        compiled: the model as `ssprop_compile` returns it.
    """

    def variant(index: int, rate: float) -> Variant:
        def run() -> None:
            # Setting the drop rate is part of the step, as in training.
            scheduler.load_state_dict({"last_step": index})
            workload.step(compiled, images)

        def saved_flops() -> float:
            scheduler.load_state_dict({"last_step": index})
            made = report(compiled)
            # A step is dense at drop rates that save no time.
            return made.saved_flops / made.backward_flops if compiled.ssprop.is_due() else 0.0

        return Variant(name, rate, model, run, saved_flops)

    return (variant(index, rate) for index, rate in enumerate(rates))


def _peers(
    workload: Workload,
    model: nn.Module,
    images: Tensor,
    rates: Sequence[float],
    sparse_report: Callable[[], Report],
) -> Iterator[Variant]:
    eager, own_kernels, swap_eager, swap_compiled = PEERS
    yield Variant(eager, 0.0, model, lambda: workload.step(model, images))
    if workload.backend == "inductor":
        faster = torch.compile(model, options={"joint_custom_pre_pass": dense_kernels()})
        yield Variant(own_kernels, 0.0, model, lambda: workload.step(faster, images))
    for rate in rates:
        swapped = swap_convs(model, rate)
        compiled = torch.compile(swapped, backend=workload.backend)

        def variant(name: str, module: nn.Module, owner: nn.Module, rate: float) -> Variant:
            return Variant(
                name,
                rate,
                owner,
                lambda: workload.step(module, images),
                lambda: _saved_by_swap(owner, sparse_report()),
            )

        yield variant(swap_eager, swapped, swapped, rate)
        yield variant(swap_compiled, compiled, swapped, rate)


def _saved_by_swap(swapped: nn.Module, made: Report) -> float:
    """Return the share of the backward's operations that a module swap leaves out."""
    convs = {name: m for name, m in swapped.named_modules() if isinstance(m, TopKConv2d)}
    saved = sum(
        site.flops * (site.channels - convs[site.name].k) / site.channels
        for site in made.sites
        if site.name in convs
    )
    return saved / made.backward_flops if made.backward_flops else 0.0
