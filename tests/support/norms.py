"""Batch norms for tests, and a run of the pass on nodes that read their gradients."""

from collections.abc import Callable

import torch
from ssprop_passes.graph.rewrite import INSERTED_KEY, inductor_decompositions
from ssprop_passes.transforms.batch_norm import BatchNormGradientPass
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

Norm = Callable[[Tensor], Tensor]


def trace(fn: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    tracer = make_fx(
        fn, inductor_decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True
    )
    return tracer(*inputs)


def rewrite(
    fn: Callable[..., Tensor], *inputs: Tensor
) -> tuple[fx.GraphModule, BatchNormGradientPass]:
    """Trace a function, mark its squares and gathers as inserted, and run the pass on it."""
    traced = trace(fn, *inputs)
    for node in traced.graph.nodes:
        if node.target in (torch.ops.aten.pow.Tensor_Scalar, torch.ops.aten.index.Tensor):
            node.meta[INSERTED_KEY] = True
    found = BatchNormGradientPass(inductor_decompositions)
    found.transform(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    return traced, found


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random numbers; mean and spread differ by channel, and the first spread is tiny."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    channels = [-1 if d == 1 else 1 for d in range(len(shape))]
    spread = torch.logspace(-3, 1, shape[1], dtype=torch.float64).view(channels)
    mean = torch.linspace(-3, 4, shape[1], dtype=torch.float64).view(channels)
    return (x * spread + mean).to(dtype)


def norm_of(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(-2, 3.5, parameter.numel()))
    return norm.double()
