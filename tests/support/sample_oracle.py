"""An eager reference of the backward of the kept samples; it shares no code with the packages.

Layers that treat each sample by itself need nothing: if the gradient of the outputs is zero for the
dropped samples, their share of every gradient is zero. Batch norm in training mode couples samples.
Here its statistics come from the whole batch. Its backward uses the kept samples alone: the sums
run over them, and the normaliser is their number.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["kept_gradients", "strongest"]


class Kept:
    """The kept samples of the backward that runs now; the batch has this many samples."""

    indices: Tensor

    def __init__(self, size: int) -> None:
        self.size = size

    def rows(self, count: int) -> Tensor:
        """Return the rows of the kept samples, where each sample has the same number of rows."""
        per_sample = count // self.size
        return (self.indices[:, None] * per_sample + torch.arange(per_sample)).flatten()


class BatchNormOfKept(torch.autograd.Function):
    """Batch norm with statistics of the whole batch, and a backward of the kept samples."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kept: Kept
    ) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
        scale = (var + eps).rsqrt()
        normal = (x - mean) * scale
        ctx.dims, ctx.shape, ctx.kept, ctx.has = dims, shape, kept, (weight, bias)
        ctx.save_for_backward(normal, scale)
        out = normal if weight is None else normal * weight.view(shape)
        return out if bias is None else out + bias.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        normal, scale = ctx.saved_tensors
        indices = ctx.kept.rows(grad.shape[0])
        weight, bias = ctx.has
        g, n = grad[indices], normal[indices]
        count = g.numel() // g.shape[1]
        grad_weight, grad_bias = (g * n).sum(ctx.dims), g.sum(ctx.dims)
        scaled = g if weight is None else g * weight.view(ctx.shape)
        mean = scaled.sum(ctx.dims, keepdim=True) / count
        slope = (scaled * n).sum(ctx.dims, keepdim=True) / count
        whole = torch.zeros_like(grad)
        whole[indices] = (scaled - mean - n * slope) * scale
        none = None
        return (
            whole,
            grad_weight if weight is not None else none,
            (grad_bias if bias is not None else none),
            none,
            none,
        )


@contextmanager
def batch_norms_of_kept(kept: Kept) -> Iterator[None]:
    """Replace `functional.batch_norm` in training mode, for samples and for their tokens."""
    original = functional.batch_norm

    def batch_norm(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        # A standardised weight has a leading dimension of 1.
        if not training or x.shape[0] % kept.size:
            args = running_mean, running_var, weight, bias, training, momentum, eps
            return original(x, *args)
        return BatchNormOfKept.apply(x, weight, bias, eps, kept)

    functional.batch_norm = batch_norm
    try:
        yield
    finally:
        functional.batch_norm = original


def strongest(gradients: list[Tensor], k: int) -> Tensor:
    """Return the factors of the samples, [N]: 1 for the k with the largest l2 norm, else 0."""
    squares = sum(g.flatten(1).square().sum(1) for g in gradients)
    assert isinstance(squares, Tensor)
    factors = torch.zeros_like(squares)
    factors[squares.argsort(descending=True)[:k]] = 1
    return factors


def kept_gradients(
    model: nn.Module,
    inputs: tuple[Any, ...],
    loss: Callable[[Any], Tensor],
    choose: Callable[[list[Tensor]], Tensor],
    size: int,
) -> dict[str, Tensor]:
    """Return the gradients of the kept samples, of all parameters and of inputs that need one.

    Args:
        model: the model.
        inputs: its arguments.
        loss: of the model's output, a tensor or a tuple of tensors with leading batch dimensions.
        choose: gradients of the outputs -> factor of each sample, [N].
        size: samples in the batch, N.
    """
    model.zero_grad()
    kept = Kept(size)
    with batch_norms_of_kept(kept):
        output = model(*inputs)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        leaves = [o.detach().requires_grad_() for o in outputs]
        value = loss(leaves[0] if isinstance(output, Tensor) else tuple(leaves))
        gradients = torch.autograd.grad(value, leaves)
        factors = choose([g.detach() for g in gradients])
        kept.indices = factors.nonzero().flatten()
        shaped = [factors.view(-1, *[1] * (g.ndim - 1)).to(g.dtype) for g in gradients]
        torch.autograd.backward(outputs, [g * f for g, f in zip(gradients, shaped, strict=True)])
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for number, value in enumerate(inputs):
        if isinstance(value, Tensor) and value.grad is not None:
            found[f"input {number}"] = value.grad.clone()
            value.grad = None
    return found
