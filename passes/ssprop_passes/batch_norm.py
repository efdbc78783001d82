"""BatchNormGradients: of a batch norm's gradient, nothing is computed but what is asked for.

A convolution's grad_output is most often the gradient that a batch norm hands down,

    dy = s * (g - (x - mean) * p - m),   m = sum(g) / N,   p = sum(g * (x - mean)) / N / std^2

with one s, mean, m, p a channel and sums over all N positions of it. Its squares, which the scores
`l2` and `l2_weight` sum, need no pass over dy, nor dy itself: as x - mean has the sum 0 and the sum
of squares N var, and std^2 = var + eps,

    sum(dy^2)  ->  s^2 * (sum(g^2) - m * sum(g) - p * sum(g * (x - mean)) * (1 + eps / std^2))

of which `sum(g^2)` alone is new, and is read with the two sums beside it. What is left to read dy
is the gather of the kept channels, so that Inductor computes those alone, and never writes dy. On a
CPU it would look up s, mean, m and p by index at every position. They are gathered first:

    dy[:, idx]  ->  s' * (g[:, idx] - (x[:, idx] - mean') * p' - m'),   s' = s[idx] and so on
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph_pass import GraphPass, Previous
from ssprop_passes.operators import gather_columns
from ssprop_passes.rewrite import INSERTED_KEY, replace_node, splice, trace
from ssprop_passes.scores import all_but

__all__ = ["BatchNormGradients", "NormGradient", "match_norm_gradient_maybe"]

aten = torch.ops.aten

_CASTS = (torch.ops.prims.convert_element_type.default,)
_VIEWS = (aten.unsqueeze.default, aten.squeeze.dims, aten.view.default)


@dataclass(frozen=True)
class NormGradient:
    """The gradient that a batch norm in train mode hands down, taken apart.

    Attributes:
        g: gradient of the norm's output, [N, C, *space].
        x: the norm's input, [N, C, *space].
        scale, mean, mean_g, projection: s, mean, m and p above, one number a channel, in any shape
            that broadcasts.
        total, dot: `sum(g)` and `sum(g * (x - mean))`, [C].
        inverse_std: 1 / std, of C elements.
        eps: what was added to the variance.
    """

    g: fx.Node
    x: fx.Node
    scale: fx.Node
    mean: fx.Node
    mean_g: fx.Node
    projection: fx.Node
    total: fx.Node
    dot: fx.Node
    inverse_std: fx.Node
    eps: float

    @property
    def of_squares(self) -> tuple[fx.Node, ...]:
        """What the sums of squares are made of, but for `eps`."""
        parts = self.scale, self.mean_g, self.projection, self.total, self.dot, self.inverse_std
        return self.g, *parts

    @property
    def constants(self) -> tuple[fx.Node, ...]:
        """The gradient's one number a channel each."""
        return self.scale, self.mean, self.mean_g, self.projection


@dataclass(frozen=True)
class Gather:
    """Channels gathered from a batch norm's gradient.

    Attributes:
        gradient: of the norm.
        indices: of the channels, [k].
        order: of the gradient's dimensions, the channels last.
    """

    gradient: NormGradient
    indices: fx.Node
    order: list[int]


class BatchNormGradients(GraphPass):
    """Rewrites what previous passes inserted that reads the gradient of a batch norm.

    Args:
        previous: pass or passes that run first, the sparse backward among them.
        decompositions: returns the decomposition table of the compiler that the graph is for.

    Attributes:
        squares: how many sums of squares were rewritten, after a run.
        gathers: how many gathers of channels were.
    """

    def __init__(
        self,
        previous: Previous,
        decompositions: Callable[[], dict[Any, Callable[..., Any]]],
    ) -> None:
        super().__init__(previous)
        self.decompositions = decompositions
        self.squares = self.gathers = 0

    def identity(self) -> str:
        """Return the same for all: the rewrite depends on the graph alone."""
        return "gradients of batch norms"

    def transform(self, graph: fx.Graph) -> None:
        """Rewrite sums over all dimensions but 1 of squared gradients, then gathers."""
        self.squares = self.gathers = 0
        for node in graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar):
            if not node.meta.get(INSERTED_KEY) or node.args[1] != 2:
                continue
            match = match_norm_gradient_maybe(node.args[0])
            total = _sum_by_channel_maybe(node)
            if match is not None and total is not None:
                squares_by_channel = functools.partial(_squares, match.eps)
                self._replace(total, squares_by_channel, match.of_squares)
                self.squares += 1
        # What read a gradient for its squares does so no longer.
        graph.eliminate_dead_code()
        for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
            gather = _gather_maybe(node)
            if gather is not None:
                kept = functools.partial(_kept, gather.order, node.meta["val"].dtype)
                of = gather.gradient
                self._replace(node, kept, (gather.indices, of.g, of.x, *of.constants))
                self.gathers += 1

    def _replace(
        self, node: fx.Node, function: Callable[..., Any], inputs: Sequence[fx.Node]
    ) -> None:
        """Put a function of some nodes in the place of a node."""
        fake_mode = node.meta["val"].fake_mode
        traced = trace(function, inputs, fake_mode, self.decompositions())
        (replacement,) = splice(node.graph, node, traced, inputs)
        assert replacement is not None
        replace_node(node, replacement)


def match_norm_gradient_maybe(node: Any) -> NormGradient | None:
    """Return the parts of a batch norm's gradient, None for any other node.

    As the decomposition of `aten.native_batch_norm_backward` computes it. Casts are looked through:
    under autocast the gradient is rounded at its end, and the sums are those of what was not.

    Args:
        node: a node of a joint graph.
    """
    dy = _strip(node, _CASTS)
    centred, scale = _operands(dy, aten.mul.Tensor)
    projected_out, mean_g = _operands(centred, aten.sub.Tensor)
    g, along = _operands(projected_out, aten.sub.Tensor)
    x_centred, projection = _operands(along, aten.mul.Tensor)
    x, mean = _operands(x_centred, aten.sub.Tensor)

    total, share = _operands(_strip(mean_g, _VIEWS), aten.mul.Tensor)
    dot_share, inverse_variance = _operands(_strip(projection, _VIEWS), aten.mul.Tensor)
    dot, same_share = _operands(dot_share, aten.mul.Tensor)
    inverse_std, same_std = _operands(inverse_variance, aten.mul.Tensor)
    same_g, same_x = _operands(_summed(dot), aten.mul.Tensor)
    known = (scale, mean, mean_g, projection, total, dot, inverse_std)
    if None in (g, x, *known) or inverse_std is not same_std or share != same_share:
        return None
    if _summed(total) is not g or same_g is not g or _operands(same_x, aten.sub.Tensor)[0] is not x:
        return None
    val: Tensor = g.meta["val"]
    count = val.numel() // val.shape[1]
    eps = _eps_maybe(x, mean, inverse_std)
    # The sums are means of all positions of a channel, or the formula is that of something else.
    if eps is None or not isinstance(share, float) or share != 1 / count:
        return None
    if any(part.meta["val"].numel() != val.shape[1] for part in known):
        return None
    return NormGradient(g, x, *known, eps)


def _squares(eps: float, *tensors: Tensor) -> tuple[Tensor]:
    """Return the sums of the squares, [C], from what the `of_squares` of a `NormGradient` are."""
    g, scale, mean_g, projection, total, dot, inverse_std = tensors
    s, m, p, inverse = (x.reshape(-1) for x in (scale, mean_g, projection, inverse_std))
    left = (g * g).sum(all_but(g, 1)) - m * total - p * dot * (1 + eps * inverse * inverse)
    # Rounding may leave a little less than nothing.
    return (s * s * left.clamp(min=0),)


def _kept(
    order: list[int],
    dtype: torch.dtype,
    indices: Tensor,
    g: Tensor,
    x: Tensor,
    *constants: Tensor,
) -> tuple[Tensor]:
    """Return the channels `indices` of the gradient, which are innermost in `order`."""
    g, x = g.permute(order), x.permute(order)
    scale, mean, mean_g, projection = gather_columns(constants, indices)
    kept = (g[..., indices] - (x[..., indices] - mean) * projection - mean_g) * scale
    return (kept.to(dtype),)


def _gather_maybe(node: fx.Node) -> Gather | None:
    """Return what a node gathers where that is better done from the gradient's parts.

    None for any other node; for devices where looking up a number a channel costs nothing; where
    channels are not innermost in memory; and where the gradient is written for others to read.
    """
    source, (*before, indices) = cast(tuple[fx.Node, list[Any]], node.args)
    val: Tensor = source.meta["val"]
    is_of_last = len(before) == val.ndim - 1 and not any(i is not None for i in before)
    if not node.meta.get(INSERTED_KEY) or not is_of_last or indices.meta["val"].ndim != 1:
        return None
    # A stride that is no number yet is not to be asked about.
    if val.device.type != "cpu" or not isinstance(val.stride(-1), int) or val.stride(-1) != 1:
        return None
    order, chain = list(range(val.ndim)), [source]
    if source.target is aten.permute.default:
        order, chain = cast(list[int], source.args[1]), [source, cast(fx.Node, source.args[0])]
    while chain[-1].target in _CASTS:
        chain.append(cast(fx.Node, chain[-1].args[0]))
    gradient = match_norm_gradient_maybe(chain[-1])
    if gradient is None or order[-1] != 1 or any(len(link.users) > 1 for link in chain):
        return None
    dtypes = {part.meta["val"].dtype for part in gradient.constants}
    is_plain = len(dtypes) == 1 and gradient.x.meta["val"].shape == gradient.g.meta["val"].shape
    return Gather(gradient, indices, order) if is_plain else None


def _sum_by_channel_maybe(node: fx.Node) -> fx.Node | None:
    """Return the node that holds a tensor's sums over all dimensions but 1, None if none does."""
    left = all_but(node.meta["val"], 1)
    while left:
        users = list(node.users)
        if len(users) != 1 or users[0].target is not aten.sum.dim_IntList or len(users[0].args) > 2:
            return None
        node = users[0]
        # All sums but the last are over trailing dimensions, so that dimension 1 stays what it is.
        dims = cast(list[int], node.args[1])
        if not set(dims) <= set(left) or (len(dims) < len(left) and 0 in dims):
            return None
        left = [d for d in left if d not in dims]
    return node


def _eps_maybe(x: fx.Node, mean: fx.Node, inverse_std: fx.Node) -> float | None:
    """Return what was added to the variance of `x`, None if these are not its mean and 1 / std."""
    root = _strip(inverse_std, _VIEWS + _CASTS)
    if not isinstance(root, fx.Node) or root.target is not aten.rsqrt.default:
        return None
    variance, eps = _operands(root.args[0], aten.add.Tensor)
    moments, is_mean = _operands(_strip(mean, _VIEWS + _CASTS), operator.getitem)
    same_moments, is_variance = _operands(_strip(variance, _VIEWS), operator.getitem)
    if moments is None or moments is not same_moments or (is_variance, is_mean) != (0, 1):
        return None
    if moments.target is not aten.var_mean.correction or moments.kwargs.get("correction") != 0:
        return None
    of = cast(fx.Node, moments.args[0])
    over = moments.args[1]
    is_of_x = _strip(of, _CASTS) is _strip(x, _CASTS) and over == all_but(of.meta["val"], 1)
    return eps if is_of_x and isinstance(eps, float) else None


def _summed(node: Any) -> Any:
    """Return what a node sums over all dimensions but 1, None for any other node."""
    is_sum = isinstance(node, fx.Node) and node.target is aten.sum.dim_IntList
    if not is_sum or len(node.args) > 2:
        return None
    x = node.args[0]
    return x if sorted(node.args[1]) == all_but(x.meta["val"], 1) else None


def _operands(node: Any, target: Any) -> Sequence[Any]:
    """Return the two operands of a node that calls `target`, (None, None) for any other."""
    if isinstance(node, fx.Node) and node.target is target and not node.kwargs:
        return node.args
    return None, None


def _strip(node: Any, targets: Sequence[Any]) -> Any:
    """Return what a chain of such calls begins with."""
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node
