"""Batch norms in training mode, behind a backward whose samples have weights.

The gradient of such a norm subtracts two means over the batch from each sample's gradient:

    before    dx_i = scale (g_i - m - n_i p),    m = mean(g), p = mean(g n), n the normalised input

A backward of the kept samples has their weights w in g already, and takes the means over the kept
samples. A sample with the weight w_i stands for w_i samples, so it takes over their corrections:

    after     dx_i = scale (g_i - v_i m - v_i n_i p),    v_i = w_i / mean(w)

Then the sums over the batch are those of the whole batch but for the noise of the draw. With equal
weights nothing changes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ssprop_passes.graph.batch_dims import BATCH_DIM_KEY, BatchDim, size_expr
from ssprop_passes.graph.rewrite import Replacer, replace_outputs
from ssprop_passes.graph.sample_marker import WEIGHTS
from ssprop_passes.selection.scores import all_but
from ssprop_passes.transforms.norm_match import match_norm_gradient_maybe

__all__ = ["weigh_corrections"]

aten = torch.ops.aten

# Where the backward operators of batch norms have (grad_output, input, weight, mean, 1 / std).
_OPERANDS: dict[Any, tuple[int, int, int, int, int]] = {
    aten.native_batch_norm_backward.default: (0, 1, 2, 5, 6),
    aten.cudnn_batch_norm_backward.default: (1, 0, 2, 5, 6),
}
_IS_TRAINING = 7  # an argument of `native_batch_norm_backward` alone


def weigh_corrections(graph: fx.Graph, choice: fx.Node) -> int:
    """Weigh the corrections of all batch norms in training mode, in place.

    Args:
        graph: joint graph whose nodes say where they have samples.
        choice: the number of the choice of samples.

    Returns:
        The number of batch norms.
    """
    found = 0
    for node in list(graph.nodes):
        if node.target in _OPERANDS:
            found += _weigh_operator(node, choice)
        elif node.target is aten.mul.Tensor:
            found += _weigh_decomposed(node, choice)
    return found


def _weigh_decomposed(node: fx.Node, choice: fx.Node) -> bool:
    """Weigh the corrections of a norm that Inductor has decomposed; False for any other node."""
    match = match_norm_gradient_maybe(node, is_symbolic=True)
    shares = None if match is None else _shares_maybe(match.g)
    if match is None or shares is None:
        return False
    minus_mean: Any = node.args[0]
    minus_projected: Any = minus_mean.args[0]
    along = minus_projected.args[1]

    def weighed(g: Tensor, along: Tensor, mean_g: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        weights = shares(g, choice)
        return along * weights, mean_g * weights

    inputs = [match.g, along, match.mean_g, choice]
    along_weighed, mean_weighed = _insert(minus_projected, weighed, inputs)
    assert along_weighed is not None
    assert mean_weighed is not None
    minus_projected.replace_input_with(along, along_weighed)
    minus_mean.replace_input_with(match.mean_g, mean_weighed)
    return True


def _weigh_operator(node: fx.Node, choice: fx.Node) -> bool:
    """Weigh the corrections of a norm's backward operator; False if its statistics are fixed."""
    if node.target is aten.native_batch_norm_backward.default and not node.args[_IS_TRAINING]:
        return False
    operands: list[Any] = [node.args[i] for i in _OPERANDS[node.target]]
    g, x, weight, mean, inverse_std = operands
    shares = _shares_maybe(g)
    if shares is None:
        return False
    inputs = [g, x, mean, inverse_std, choice, *([] if weight is None else [weight])]

    def backward(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g, x, mean, inverse_std, choice = tensors[:5]
        weight = tensors[5] if len(tensors) > 5 else None
        wide = torch.promote_types(x.dtype, torch.float32)
        over, shape = all_but(x, 1), [1, -1, *[1] * (x.ndim - 2)]
        grad, std = g.to(wide), inverse_std.to(wide)
        normal = (x.to(wide) - mean.view(shape)) * std.view(shape)
        total, dot = grad.sum(over), (grad * normal).sum(over)
        count = x.numel() / x.shape[1]
        correction = (total / count).view(shape) + normal * (dot / count).view(shape)
        scale = std if weight is None else std * weight
        dx = (grad - correction * shares(g, choice).to(wide)) * scale.view(shape)
        of_weight = mean.dtype if weight is None else weight.dtype
        return dx.to(x.dtype), dot.to(of_weight), total.to(of_weight)

    replace_outputs(node, _insert(node, backward, inputs))
    node.graph.erase_node(node)
    return True


def _insert(
    before: fx.Node, fn: Callable[..., Any], inputs: Sequence[fx.Node]
) -> tuple[fx.Node | None, ...]:
    """Insert a function, whose first input says where the new nodes have samples."""
    first = before.prev
    outputs = Replacer(dict).insert(before, fn, inputs)
    entries = inputs[0].meta["val"].shape[0]
    node = before.prev
    while node is not first:
        value = node.meta.get("val")
        sizes = value.shape[:1] if isinstance(value, Tensor) else ()
        if [size_expr(size) for size in sizes] == [size_expr(entries)]:
            node.meta[BATCH_DIM_KEY] = inputs[0].meta[BATCH_DIM_KEY]
        node = node.prev
    return outputs


def _shares_maybe(g: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return a function that gives v, in a shape that broadcasts over g, [N, C, *space].

    None if g does not have the samples in its first dimension, in whole numbers of entries.
    """
    position: BatchDim | None = g.meta.get(BATCH_DIM_KEY)
    if position is None or position.dim != 0 or not position.inner.is_Integer:
        return None
    if not position.outer.is_Integer:
        return None
    outer, inner = int(position.outer), int(position.inner)

    def shares(g: Tensor, choice: Tensor) -> Tensor:
        weights: Tensor = WEIGHTS(g, choice, outer * inner)
        if outer * inner > 1:
            weights = weights.view(1, -1, 1).expand(outer, -1, inner).reshape(-1)
        return weights.view(-1, *[1] * (g.ndim - 1))

    return shares
