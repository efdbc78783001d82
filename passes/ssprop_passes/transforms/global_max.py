"""GlobalMaxPass: the exact backward of a 1-D convolution under a global max pooling.

Only the position that won has a gradient, one for each sample and channel. Torch writes these few
numbers into zeros and computes the gradients of the convolution from all positions. The pass

    before    dy = f(zeros.scatter(winner, g), saved)              [N, C, L]
              dx, dw, db = convolution_backward(dy, x, w)

    after     v = f(g, saved[winner])                              [N, C]
              dw = sum_n v * windows(x, winner)                    [N, C, C_in, K]
              dx = zeros.scatter_add(windows, v * w),  db = sum_n v

drops nothing: terms that are zero are left out, so the gradients are those of the dense backward
except for the order of sums. f is whatever is computed between pooling and convolution, position by
position, such as the backward of a ReLU or of a gate: every f that keeps zeros is followed.

This is the structure of text classifiers (Kim, EMNLP 2014) and of MalConv (Raff et al., 2018).
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.rewrite import (
    INSERTED_KEY,
    Replacer,
    inductor_decompositions,
    replace_node,
    replace_outputs,
)
from ssprop_passes.kernels.windows import ADD_WINDOWS
from ssprop_passes.replacements.winners import grad_input, grad_weight
from ssprop_passes.sites.winner_match import VIEWS, Winners, find_winners_maybe

__all__ = ["GlobalMaxPass"]

aten = torch.ops.aten

# Windows are gathered and scattered element by element, which costs more than a product.
_FEW_POSITIONS = "it has few positions, so the dense backward is as fast"
_OTHER = "its gradient is not that of a global max pooling alone"
_SMALLEST_LENGTH = 32


class GlobalMaxPass(GraphPass):
    """Computes the backward of 1-D convolutions under a global max pooling from the winners alone.

    It is exact, needs no schedule, and works in dense training:

        torch.compile(model, options={"joint_custom_pre_pass": GlobalMaxPass()})

    The convolution has no groups. The pooling is `max_pool1d` over the whole length,
    `AdaptiveMaxPool1d(1)` or `x.max(2)`. Convolutions with few positions stay as they are.
    """

    def identity(self) -> str:
        """Return a constant: the rewrite depends only on the graph."""
        return "global max"

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite each convolution's backward whose gradient comes from winners alone."""
        replacer, summary = Replacer(inductor_decompositions), PassSummary()
        target = aten.convolution_backward.default
        for node in list(graph.find_nodes(op="call_function", target=target)):
            if node.meta.get(INSERTED_KEY) or cast(fx.Node, node.args[0]).meta["val"].ndim != 3:
                continue
            summary.matched += 1
            length = cast(fx.Node, node.args[0]).meta["val"].shape[2]
            winners = find_winners_maybe(cast(fx.Node, node.args[0]))
            groups, transposed = node.args[9], node.args[7]
            if winners is None or groups != 1 or transposed:
                summary.left[_OTHER] += 1
            elif not isinstance(length, int) or length < _SMALLEST_LENGTH:
                summary.left[_FEW_POSITIONS] += 1
            else:
                _rewrite(replacer, node, winners)
                summary.rewritten += 1
        for node in list(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
            _add_together(replacer, node)
        return summary


def _rewrite(replacer: Replacer, node: fx.Node, winners: Winners) -> None:
    """Replace a convolution's backward."""
    grad_output, input_, weight = cast(tuple[fx.Node, ...], node.args[:3])
    _, (stride,), (padding,), (dilation,) = cast(tuple[Any, ...], node.args[3:7])
    wanted = cast(tuple[bool, bool, bool], node.args[-1])
    size, channels, length = grad_output.meta["val"].shape
    inputs = [input_, weight, winners.gradient, winners.index, *winners.others]

    def backward(*tensors: Tensor) -> tuple[Tensor | None, ...]:
        x, w, gradient, index = tensors[:4]
        positions = index.reshape(size, channels, 1)

        def at_winners(tensor: Tensor) -> Tensor:
            if tensor.numel() == size * channels * length:
                return tensor.reshape(size, channels, length).gather(2, positions).squeeze(2)
            if tensor.ndim == 0 or tensor.shape[-1] == 1:
                return tensor.expand(size, channels, 1).squeeze(2)
            return tensor.expand(size, channels, length).gather(2, positions).squeeze(2)

        known = {
            other: at_winners(tensor)
            for other, tensor in zip(winners.others, tensors[4:], strict=True)
        }
        known[winners.source] = gradient.reshape(size, channels)
        v = _follow(winners.path, known).to(w.dtype)
        geometry = stride, padding, dilation
        of_input, of_weight, of_bias = wanted
        return (
            grad_input(v, x, w, positions, *geometry) if of_input else None,
            grad_weight(v, x, w, positions, *geometry) if of_weight else None,
            v.sum(0) if of_bias else None,
        )

    replace_outputs(node, replacer.insert(node, backward, inputs))


def _add_together(replacer: Replacer, node: fx.Node) -> None:
    """Compute a sum of two gradients of an input, such as that of a gate and its signal, as one.

    The windows of both are added to the same zeros.
    """
    terms = [o for o in node.args if isinstance(o, fx.Node) and o.target is ADD_WINDOWS]
    if len(terms) < 2 or any(len(term.users) > 1 for term in terms):
        return
    tensors, geometries = zip(*((term.args[:3], term.args[3:]) for term in terms), strict=True)
    kernels = {weight.meta["val"].shape[1:] for _, weight, _ in tensors}
    if geometries[0] != geometries[1] or len(kernels) > 1:
        return

    def both(*tensors: Tensor) -> tuple[Tensor]:
        v, w, winners = (
            torch.cat([tensors[i], tensors[i + 3]], dim) for i, dim in enumerate((1, 0, 1))
        )
        return (ADD_WINDOWS(v, w, winners, *geometries[0]),)

    (total,) = replacer.insert(node, both, [*tensors[0], *tensors[1]])
    assert total is not None
    replace_node(node, total)


def _follow(path: tuple[fx.Node, ...], known: Mapping[fx.Node, Tensor]) -> Tensor:
    """Compute the gradient at the winners, [N, C], along the path from the pooling."""
    values = dict(known)
    for node in path:
        if node.target in VIEWS:
            values[node] = values[cast(fx.Node, node.args[0])]
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = cast(Callable[..., Tensor], node.target)(*args, **kwargs)
    return values[path[-1] if path else next(reversed(values))]
