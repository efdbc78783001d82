"""A peer: selective backprop, as a training loop does it without help from a compiler.

    with torch.no_grad():
        losses = loss(model(images))                      # of the whole batch
    loss(model(images[losses.topk(k).indices])).mean().backward()

The forward of the kept samples runs twice, and batch norms see the whole batch and then the kept
samples. Composer's `SelectiveBackprop` does this, after Jiang et al., Accelerating Deep Learning by
Focusing on the Biggest Losers, arXiv 1910.00762; it draws the samples by their loss.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

from benchmarks.variants import Variant
from benchmarks.workload import Workload
from ssprop_fx.scheduling.keep_counts import keep_count

__all__ = ["SELECTIVE", "selective_variants"]

SELECTIVE = ("selective eager", "selective compiled")


def selective_variants(
    workload: Workload, model: nn.Module, images: Tensor, drop_rates: Sequence[float]
) -> Iterator[Variant]:
    """Yield the peer at each drop rate, eager and compiled for a batch of any size.

    Args:
        workload: the workload that built `model` and `images`.
        model: the model.
        images: a batch.
        drop_rates: fractions of the batch left out.
    """

    # A function of its own, because Dynamo shares code between compiles with equal backends.
    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = lookup_backend(workload.backend)(gm, list(inputs))
        return compiled

    modules = dict(zip(SELECTIVE, (model, torch.compile(model, backend=backend)), strict=True))
    for name, module in modules.items():
        for rate in drop_rates:
            kept = keep_count(len(images), rate)

            def run(module: nn.Module = module, kept: int = kept) -> None:
                _step(workload, module, images, kept)

            yield Variant(name, rate, model, run)


def _step(workload: Workload, module: nn.Module, images: Tensor, kept: int) -> None:
    with torch.no_grad():
        losses = workload.losses(module, _of_any_size(images.view_as(images)))
    chosen = images[losses.topk(kept).indices]
    workload.step(module, _of_any_size(chosen))


def _of_any_size(images: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(images, 0)
    return images
