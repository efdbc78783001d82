"""Ways to run a training step that need less memory, as functions that run forward and backward."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

from benchmarks.samples import CONFIGS
from benchmarks.saved.operators import BLOCK
from benchmarks.saved.prune_pass import PruneSavedPass
from benchmarks.variants import DENSE, sparse_variants
from benchmarks.workload import Workload
from ssprop_fx import SparsityScheduler, constant, join, ssprop_compile

__all__ = ["METHODS", "Method", "make_methods"]

METHODS = ("budget", "checkpoint", "two passes", "bf16", "pruned")


@dataclass(frozen=True)
class Method:
    """A way to run a step.

    Attributes:
        name: `dense` or one of METHODS.
        setting: what the method was set to, as text.
        model: the module whose parameters get the gradients.
        run: runs forward and backward.
    """

    name: str
    setting: str
    model: nn.Module
    run: Callable[[], None]

    def step(self) -> None:
        """Run one step."""
        self.model.zero_grad()
        self.run()


def make_methods(
    workload: Workload,
    model: nn.Module,
    images: Tensor,
    names: Sequence[str],
    budgets: Sequence[float],
    drop_rates: Sequence[float],
    kept: Sequence[int],
) -> Iterator[Method]:
    """Yield dense torch.compile and the methods.

    Args:
        workload: the workload that built `model` and `images`.
        model: the model.
        images: a batch.
        names: which of METHODS.
        budgets: of torch's `activation_memory_budget`, below 1.
        drop_rates: of samples, for two passes.
        kept: features that pruning keeps of every eight.
    """

    def method(
        name: str,
        setting: str,
        owner: nn.Module = model,
        work: Workload = workload,
        budget: float = 1.0,
        options: Mapping[str, Any] | None = None,
    ) -> Method:
        compiled = torch.compile(owner, backend=_backend(budget, options or {}))
        return Method(name, setting, owner, lambda: work.step(compiled, images))

    yield method(DENSE, "")
    if "budget" in names:
        for budget in budgets:
            yield method("budget", f"{budget:g}", budget=budget)
    if "checkpoint" in names:
        owner = copy.deepcopy(model)
        owner.set_grad_checkpointing(True)
        yield method("checkpoint", "every block", owner)
    if "two passes" in names:
        yield from _two_passes(workload, model, images, drop_rates)
    if "bf16" in names:
        yield method("bf16", "autocast", work=replace(workload, amp=True))
    if "pruned" in names:
        for number in kept:
            options = {"joint_custom_pre_pass": PruneSavedPass(number)}
            yield method("pruned", f"{number} of {BLOCK}", options=options)


def _backend(budget: float, options: Mapping[str, Any]) -> Callable[..., Any]:
    # A function of its own, because Dynamo shares code between compiles with equal backends.
    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            return compile_fx(gm, list(inputs), config_patches=dict(options))

    return backend


def _two_passes(
    workload: Workload, model: nn.Module, images: Tensor, drop_rates: Sequence[float]
) -> Iterator[Method]:
    scheduler = SparsityScheduler(
        join([constant(rate) for rate in drop_rates], range(1, len(drop_rates)))
    )
    compiled = ssprop_compile(model, scheduler, config=CONFIGS["two passes"])
    variants = sparse_variants(
        workload, model, images, "two passes", drop_rates, scheduler, compiled
    )
    for variant in variants:
        yield Method(variant.name, f"drop {variant.drop_rate:g}", model, variant.run)
