"""How many bytes go from forward to backward, and how many of them for weight gradients alone.

Inductor's partitioner decides what is saved and what is computed again. Here it does so for the
joint graph of a model, and again for the same graph without the weight gradients of its linear
layers and 1x1 convolutions: the difference is all that pruning their inputs could free. No kernel
is compiled.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from ssprop_passes.graph.rewrite import Replacer, inductor_decompositions
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import partition_fn

from benchmarks.saved.prune_pass import PruneSavedPass
from benchmarks.saved.sites import Site, find_sites
from benchmarks.workload import Workload

__all__ = ["FORMATS_OF_BYTES", "BytesRow", "graphs_backend", "measure_bytes"]

FORMATS_OF_BYTES = {
    "budget": ".2f",
    "saved_mib": ".1f",
    "without_mib": ".1f",
    "freed_by_all": ".2f",
    "pruned_mib": ".1f",
}

Parts = tuple[fx.GraphModule, fx.GraphModule]


@dataclass(frozen=True, kw_only=True)
class BytesRow:
    """What a model saves at one memory budget.

    Attributes:
        model: title of the workload.
        budget: `activation_memory_budget`; 1 is the default of torch.compile.
        saved_mib: what the forward saves, without parameters and inputs.
        without_mib: the same, if no weight gradient of a linear layer or 1x1 convolution existed.
        freed_by_all: the share of what is saved that these weight gradients alone need.
        pruned_mib: saved with `PruneSavedPass` in place.
        kept: features that it keeps of every eight.
        sites: weight gradients that were left out of `without_mib`.
    """

    model: str
    budget: float
    saved_mib: float
    without_mib: float
    freed_by_all: float
    pruned_mib: float
    kept: int
    sites: int


def graphs_backend(
    partition: Callable[..., Parts], passes: Sequence[Callable[[fx.Graph], None]] = ()
) -> Callable[..., Any]:
    """Return a backend that makes Inductor's joint graph, and runs its parts without compiling.

    Args:
        partition: called like torch's partitioners, with the joint graph after Inductor's passes.
        passes: run on the joint graph before Inductor's.
    """

    def split(gm: fx.GraphModule, inputs: Sequence[object], **kwargs: Any) -> Parts:
        for graph_pass in passes:
            graph_pass(gm.graph)
        gm.recompile()
        return partition_fn(gm, inputs, partitioner_fn_override=partition, **kwargs)

    def uncompiled(gm: fx.GraphModule, _: Sequence[object]) -> Callable[..., Any]:
        return cast(Callable[..., Any], make_boxed_func(gm))

    return cast(
        Callable[..., Any],
        aot_autograd(
            fw_compiler=uncompiled,
            bw_compiler=uncompiled,
            partition_fn=split,
            decompositions=inductor_decompositions(),
        ),
    )


def measure_bytes(workload: Workload, budgets: Iterable[float], kept: int = 2) -> list[BytesRow]:
    """Return what a workload's model saves at each budget.

    Args:
        workload: the model and its input.
        budgets: values of `activation_memory_budget`.
        kept: features that the pruned form keeps of every eight.
    """
    model, images = workload.build()
    rows: list[BytesRow] = []

    def partition(gm: fx.GraphModule, inputs: Sequence[object], **kwargs: Any) -> Parts:
        without = copy.deepcopy(gm)
        sites = _leave_out_weight_gradients(without.graph)
        pruned = copy.deepcopy(gm)
        PruneSavedPass(kept)(pruned.graph)
        for budget in budgets:
            saved, rest, less = (
                _saved_mib(graph, inputs, budget, kwargs) for graph in (gm, without, pruned)
            )
            rows.append(
                BytesRow(
                    model=workload.title,
                    budget=budget,
                    saved_mib=saved,
                    without_mib=rest,
                    freed_by_all=1 - rest / saved,
                    pruned_mib=less,
                    kept=kept,
                    sites=sites,
                )
            )
        return min_cut_rematerialization_partition(gm, inputs, **kwargs)

    torch._dynamo.reset()
    workload.losses(torch.compile(model, backend=graphs_backend(partition)), images)
    return rows


def _saved_mib(
    gm: fx.GraphModule, inputs: Sequence[object], budget: float, kwargs: dict[str, Any]
) -> float:
    with torch._functorch.config.patch(activation_memory_budget=budget):
        forward, _ = min_cut_rematerialization_partition(copy.deepcopy(gm), inputs, **kwargs)
    outputs = cast(Sequence[Any], forward.graph.output_node().args[0])
    saved = {node for node in outputs[kwargs["num_fwd_outputs"] :] if node.op != "placeholder"}
    values = [node.meta["val"] for node in saved]
    sizes = (value.nbytes for value in values if isinstance(value, Tensor))
    return sum(sizes) / 2**20


def _leave_out_weight_gradients(graph: fx.Graph) -> int:
    """Put zeros in place of the weight gradients; return how many."""
    replacer = Replacer(inductor_decompositions)

    def leave_out(site: Site) -> None:
        def zeros(grad_output: Tensor) -> tuple[Tensor]:
            gradient = site.rows(grad_output)
            return (site.like_weight(gradient.new_zeros(gradient.shape[1], features)),)

        features = site.input.meta["val"].shape[1]
        (gradient,) = replacer.insert(site.node, zeros, [site.grad_output])
        assert gradient is not None
        site.replace(gradient)

    sites = list(find_sites(graph))
    for site in sites:
        leave_out(site)
    return len(sites)
