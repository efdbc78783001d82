"""Error feedback: the next step adds what a layer's sparse backward left out.

This is memorized sparse back-propagation (Zhang et al., arXiv 1905.10194). For y = W x with memory
m and coefficient eta in [0, 1):

    g  = dL/dy + eta * m
    s  = select(g)
    dW = s x^T,  dx = W^T s
    m <- g - s

The next batch has other samples, so m is the mean of g - s over the batch, and is added to the
gradient of every sample. The sum over a batch of N samples gets back N times the mean of what was
left out, which is all that such a batch left out. If the loss is a mean over the batch, the
gradient of one sample is proportional to 1 / N, and so is m.
"""

import torch
from torch import Tensor

__all__ = ["MEMORY_KEY", "left_out", "recall"]

# Key in `node.meta["custom"]`, which AOTAutograd copies from a forward node to its backward
# nodes. The value is the index of the node's call among the calls of layers in the graph.
MEMORY_KEY = "ssprop_memory"


def recall(grad_output: Tensor, memory: Tensor, coefficient: float) -> Tensor:
    """Return `grad_output + coefficient * memory` in the dtype of `grad_output`.

    Args:
        grad_output: [N, C, *space].
        memory: [C, *space].
        coefficient: eta.
    """
    return (grad_output + coefficient * memory).to(grad_output.dtype)


def left_out(
    grad_output: Tensor, indices: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the batch mean of what a selection leaves out of a gradient.

    A value that is not finite counts as zero: a `GradScaler` skips a step that overflows, and the
    next step must not find the overflow here.

    Args:
        grad_output: [N, C, *space].
        indices: kept channels, [k].
        weights: factor of each kept channel, [k]; None if all are 1.
        dtype: dtype of the result.

    Returns:
        The mean of `grad_output - s`, [C, *space]; s is the weighted kept channels.
    """
    mean = grad_output.mean(0, dtype=dtype)
    if weights is None:
        left = mean.index_fill(0, indices, 0.0)
    else:
        shares = (1 - weights).to(dtype).view(-1, *[1] * (mean.ndim - 1))
        left = mean.index_put([indices], mean[indices] * shares)
    return left.nan_to_num(0.0, 0.0, 0.0)
