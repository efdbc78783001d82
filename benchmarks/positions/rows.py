"""Rows: the weight gradient of a linear layer from some rows, drawn without bias.

A row is a position of a sample: a token, or a pixel of a 1x1 convolution. The input gradient is
exact.

    before    dw = mm(t(dy), x)
    after     p = min(1, c * norm(dy, dim=1) * norm(x, dim=1)), sum(p) = k
              dw = mm(t(dy[idx] / p[idx]), x[idx])

This is the second sampler of VCAS (Wang et al., ICLR 2024). A norm product is the norm of the row's
own part of the gradient, so of all draws of k rows this one has the least variance.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["RowConv2d", "RowLinear", "draw_rows", "is_row_conv", "is_row_linear", "swap_rows"]

# Below this product of channels over their sum, norms and gathers take what the product saves.
_FEWEST_CHANNELS = 64

# Rounds to find the rows with p = 1; each round finds at least one more or is the last.
_ROUNDS = 20


def draw_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return rows drawn with probabilities proportional to their scores, capped at 1.

    The draw is systematic, in order of the rows. Unlike `ssprop_passes.selection.selectors.sampled`
    it needs no sort, which takes longer than the product that is saved if rows are many.

    Args:
        scores: [T], finite, not negative.
        k: how many; fewer if fewer scores are above 0.

    Returns:
        Indices, int64 [about k], and weights 1/p in the dtype of `scores`.
    """
    s = scores.double()
    p = s * (k / s.sum())
    for _ in range(_ROUNDS):
        is_certain = p >= 1
        certain = int(is_certain.sum())
        rest = float(torch.where(is_certain, 0.0, s).sum())
        if certain >= k or rest == 0:
            break
        before, p = p, torch.where(is_certain, 1.0, s * ((k - certain) / rest))
        if torch.equal(before.clamp(max=1), p):
            break
    p = p.clamp(max=1)
    below = (p.cumsum(0) + torch.rand((), dtype=p.dtype)).floor()
    is_drawn = torch.diff(below, prepend=below.new_zeros(1)) > 0
    indices = is_drawn.nonzero()[:, 0]
    return indices, p[indices].reciprocal().to(scores.dtype)


@torch.library.custom_op(
    "benchmarks::row_grad_weight", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def row_grad_weight(grad_output: Tensor, input: Tensor, share: Tensor) -> Tensor:
    """Return the weight gradient [C, C_in] of `grad_output` [T, C] and `input` [T, C_in].

    An operator of its own: it reads values, and the sliced backward takes it as it is.

    Args:
        grad_output: gradient of the layer's output.
        input: the layer's input.
        share: share of the rows that are drawn, a number on the CPU: read at each step, so that one
            compile serves all.
    """
    k = max(round(float(share) * len(input)), 1)
    scores = torch.linalg.vector_norm(grad_output, dim=1) * torch.linalg.vector_norm(input, dim=1)
    total = float(scores.sum())
    if k >= len(input) or not 0 < total < torch.inf:
        return grad_output.t() @ input
    indices, weights = draw_rows(scores, k)
    kept = grad_output.index_select(0, indices).mul_(weights[:, None])
    return kept.t() @ input.index_select(0, indices)


@row_grad_weight.register_fake
def _(grad_output: Tensor, input: Tensor, share: Tensor) -> Tensor:
    return grad_output.new_empty(grad_output.shape[1], input.shape[1])


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, share: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input, weight, share)
        ctx.has_bias = bias is not None
        return functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, share = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_weight = row_grad_weight(rows, input.reshape(-1, input.shape[-1]), share)
        grad_bias = rows.sum(0) if ctx.has_bias else None
        return grad_output @ weight, grad_weight, grad_bias, None


class _RowConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, share: Tensor
    ) -> Tensor:
        ctx.save_for_backward(input, weight, share)
        ctx.has_bias = bias is not None
        return functional.conv2d(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, share = ctx.saved_tensors
        geometry: Any = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False])
        grad_input = torch.ops.aten.convolution_backward(
            grad_output, input, weight, None, *geometry
        )[0]
        rows, inputs = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (grad_output, input))
        grad_weight = row_grad_weight(rows, inputs, share)[:, :, None, None]
        grad_bias = grad_output.sum((0, 2, 3)) if ctx.has_bias else None
        return grad_input, grad_weight, grad_bias, None


class RowLinear(nn.Linear):
    """A linear layer whose weight gradient is of some rows.

    Attributes:
        share: share of the rows that are drawn, a number.
    """

    share: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the layer."""
        return cast(Tensor, _RowLinear.apply(input, self.weight, self.bias, self.share))


class RowConv2d(nn.Conv2d):
    """A 1x1 convolution whose weight gradient is of some positions.

    Attributes:
        share: share of the positions that are drawn, a number.
    """

    share: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the layer."""
        return cast(Tensor, _RowConv.apply(input, self.weight, self.bias, self.share))


def is_row_linear(module: nn.Module) -> bool:
    """Say whether a module is a linear layer that rows make faster."""
    return type(module) is nn.Linear and _is_wide(module.in_features, module.out_features)


def is_row_conv(module: nn.Module) -> bool:
    """Say whether a module is a 1x1 convolution that rows make faster."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
        and _is_wide(module.in_channels, module.out_channels)
    )


def swap_rows(model: nn.Module, share: float | Tensor) -> nn.Module:
    """Make a model's linear layers and 1x1 convolutions take rows; names and tensors stay.

    Args:
        model: the model; it is changed.
        share: share of the rows that are drawn; a tensor may change from step to step.

    Returns:
        The model.
    """
    shared = torch.as_tensor(share)
    for module in model.modules():
        if is_row_linear(module) or is_row_conv(module):
            module.__class__ = RowLinear if type(module) is nn.Linear else RowConv2d
            module.share = shared
    return model


def _is_wide(inputs: int, outputs: int) -> bool:
    return inputs * outputs >= _FEWEST_CHANNELS * (inputs + outputs)
