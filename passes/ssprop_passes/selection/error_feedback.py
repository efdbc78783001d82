"""Error feedback: what a sparse backward of a layer leaves out is added in the next step.

Memorized sparse back-propagation (Zhang et al., arXiv 1905.10194) of y = W x with memory m and
coefficient eta in [0, 1):

    g  = dL/dy + eta * m
    s  = select(g)
    dW = s x^T,  dx = W^T s
    m <- g - s

The samples of one batch are not those of the next, so m is the mean of g - s over the batch, and
is added to the gradient of every sample: the sum over a batch of N samples gets back N times the
mean of what was left out, which is what was left out of such a batch. Where a loss is a mean over
the batch, gradients of single samples are in proportion to 1 / N, and so is m.
"""

import torch
from torch import Tensor

__all__ = ["MEMORY_KEY", "left_out", "recall"]

# Key in `node.meta["custom"]`, which AOTAutograd copies from a forward node to its backward
# nodes, of the number of the call, among those of layers in the graph, that the node's gradient
# goes with.
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

    What is not finite counts as zero: a `GradScaler` skips a step that overflows, and the next one
    must not find it here.

    Args:
        grad_output: [N, C, *space].
        indices: channels that are kept, [k].
        weights: what each of these is multiplied by, [k]; None where all are 1.
        dtype: that of the result.

    Returns:
        The mean of `grad_output - s`, [C, *space], s being the weighted kept channels.
    """
    mean = grad_output.mean(0, dtype=dtype)
    if weights is None:
        left = mean.index_fill(0, indices, 0.0)
    else:
        shares = (1 - weights).to(dtype).view(-1, *[1] * (mean.ndim - 1))
        left = mean.index_put([indices], mean[indices] * shares)
    return left.nan_to_num(0.0, 0.0, 0.0)
