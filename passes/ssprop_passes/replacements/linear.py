"""Linear layers: their gradients from the strongest features of grad_output.

These are plain torch functions. A pass traces them into the graph, and tests call them directly.

    before    dx = mm(dy, w)
              dw = mm(t(dy), x)
              db = sum(dy, 0)

    after     idx = topk(norm(dy, dim=0), k)
              dx = mm(dy[:, idx], w[idx])
              dw = zeros.index_put([idx], mm(t(dy[:, idx]), x))
              db = zeros.index_put([idx], sum(dy[:, idx], 0))
"""

from collections.abc import Sequence

from torch import Tensor

from ssprop_passes.replacements.gradients import Gradients
from ssprop_passes.selection.gather_scatter import gather_weight, scatter_rows, sum_channels
from ssprop_passes.selection.policy import Selection

__all__ = ["sparse_linear_backward"]


def sparse_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    k: int,
    output_mask: Sequence[bool],
    selection: Selection = Selection(),
    memory: Tensor | None = None,
) -> Gradients:
    """Return the gradients of a linear layer from the k kept features of `grad_output`.

    This is the unified top-k of meProp (Sun et al., arXiv 1706.06197): one choice of features for
    all samples, by default ranked by l2 norm.

    Args:
        grad_output: [T, C]; T is the product of all leading dimensions.
        input: [T, C_in].
        weight: [C, C_in].
        k: keep count, in [1, C]; may be a SymInt.
        output_mask: which of the gradients of input, weight and bias are wanted.
        selection: which features are kept; those with the largest l2 norm by default.
        memory: what the last step left out; updated in place. None without memory.

    Returns:
        Full-size gradients of input, weight and bias, None if not wanted. Weight rows and bias
        entries of features that were not selected are zero.
    """
    kept, indices = selection.keep(grad_output, weight, k, memory=memory)
    grad_input = grad_weight = grad_bias = None
    if output_mask[0]:
        grad_input = kept @ gather_weight(weight, indices)
    if output_mask[1]:
        grad_weight = scatter_rows(kept.t() @ input, indices, weight)
    if output_mask[2]:
        bias = grad_output.new_empty(grad_output.shape[1])
        grad_bias = scatter_rows(sum_channels(kept), indices, bias)
    return grad_input, grad_weight, grad_bias
