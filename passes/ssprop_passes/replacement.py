"""The sparse backward as plain torch functions: at once the reference and what the pass traces.

Per-channel top-k of ssProp (Zhong, Huang, Shi, arXiv 2408.12561, section 3): rank the channels of
the gradient of the output by mean magnitude, keep the k largest, and compute every gradient from
those alone:

    dense                                    sparse
    dX, dW, db = conv_backward(dY, X, W)     idx = topk(mean(|dY|), k)
                                             dX, dW[idx] = conv_backward(dY[:, idx], X, W[idx])
                                             db[idx] = sum(dY[:, idx])
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["channel_scores", "select_channels", "sparse_conv_backward"]

aten = torch.ops.aten


def channel_scores(grad_output: Tensor) -> Tensor:
    """Return the mean magnitude of each channel, over batch and space.

    Args:
        grad_output: [N, C, *space].

    Returns:
        Scores, [C].
    """
    return grad_output.abs().mean([d for d in range(grad_output.ndim) if d != 1])


def select_channels(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest scores, in no order, as int64 [k]."""
    return torch.topk(scores, k, sorted=False).indices


def gather_channels(x: Tensor, indices: Tensor) -> Tensor:
    """Return `x[:, indices]` in the memory format of `x`.

    Args:
        x: [N, C, *space].
        indices: [k].

    Returns:
        [N, k, *space].
    """
    if is_channels_last(x):
        # Indexing dimension 1 directly yields a contiguous tensor when the number of indices is
        # only known at run time, and convolutions on it are two to three times slower.
        return x.permute(0, 2, 3, 1)[..., indices].permute(0, 3, 1, 2)
    return x[:, indices]


def is_channels_last(x: Tensor) -> bool:
    """Say whether a 4-D tensor lies channels last; never where its space is 1x1.

    A 1x1 space has no layout, and torch asks the unbacked channel count for one.
    """
    if x.ndim != 4 or (x.shape[2] == 1 and x.shape[3] == 1):
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def sparse_conv_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    k: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of a convolution from the k strongest channels of `grad_output`.

    Args:
        grad_output: [N, C, *out_space].
        input: [N, C_in, *space].
        weight: [C, C_in, *kernel]; one group.
        k: keep count, in [1, C]; may be a SymInt.
        stride, padding, dilation: of the convolution, one entry a spatial dimension.
        output_mask: which of the gradients of input, weight and bias are wanted.

    Returns:
        Gradients of input, weight and bias, full-size, None where not wanted. Rows of the weight
        and entries of the bias that were not selected are zero.
    """
    indices = select_channels(channel_scores(grad_output), k)
    kept = gather_channels(grad_output, indices)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0] or output_mask[1]:
        grad_input, kept_rows, _ = aten.convolution_backward(
            kept,
            input,
            weight[indices],
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            1,
            [output_mask[0], output_mask[1], False],
        )
        if output_mask[1]:
            grad_weight = scatter_rows(weight, indices, kept_rows)
    if output_mask[2]:
        sums = kept.sum([d for d in range(kept.ndim) if d != 1])
        grad_bias = scatter_rows(grad_output.new_empty(grad_output.shape[1]), indices, sums)
    return grad_input if output_mask[0] else None, grad_weight, grad_bias


def scatter_rows(like: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor of the shape of `like` that holds `rows` at `indices` and zeros elsewhere.

    Args:
        like: [C, ...].
        indices: [k].
        rows: [k, ...].
    """
    return torch.zeros_like(like).index_put([indices], rows)
