"""BatchNormGradientPass: computes only the parts of a batch norm's gradient that are used.

A convolution's grad_output is most often the input gradient of a batch norm,

    dy = s * (g - (x - mean) * p - m),   m = sum(g) / N,   p = sum(g * (x - mean)) / N / std^2

with one s, mean, m and p per channel, and sums over all N positions of the channel. The scores `l2`
and `l2_weight` sum the squares of dy. They can do so without dy: because x - mean has the sum 0 and
the sum of squares N var, and because std^2 = var + eps,

    sum(dy^2)  ->  s^2 * (sum(g^2) - m * sum(g) - p * sum(g * (x - mean)) * (1 + eps / std^2))

Only `sum(g^2)` is new here, and it is computed together with the two other sums.

Then only the gather of the kept channels reads dy: the other channels need not be computed, and dy
need not be written to memory. Inductor on its own writes dy to memory when a kernel reads many
tensors, as after a residual connection. On a CPU it also looks up s, mean, m and p by index at
every position. So the pass gathers first,

    dy[:, idx]  ->  s' * (g[:, idx] - (x[:, idx] - mean') * p' - m'),   s' = s[idx] and so on

On a CPU our kernel does this if its operands are in memory anyway. If g must still be computed,
Inductor's kernel does it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.rewrite import INSERTED_KEY, Replacer, replace_node
from ssprop_passes.kernels.gather_norm_gradient import DTYPES, norm_gradient
from ssprop_passes.kernels.operators import gather_columns, gather_norm_gradient
from ssprop_passes.selection.scores import all_but
from ssprop_passes.transforms.norm_match import (
    CASTS,
    NormGradient,
    Written,
    match_norm_gradient_maybe,
)

__all__ = ["BatchNormGradientPass"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Gather:
    """Channels gathered from a batch norm's gradient.

    Attributes:
        gradient: the norm's gradient.
        indices: channels to gather, [k].
        order: order of the gradient's dimensions, with the channels last.
        written: what our kernel reads; None if our kernel does not do the gather.
    """

    gradient: NormGradient
    indices: fx.Node
    order: list[int]
    written: Written | None


class BatchNormGradientPass(GraphPass):
    """Rewrites nodes that previous passes inserted to read the gradient of a batch norm.

    Args:
        decompositions: returns the decomposition table of the compiler that the graph is for.

    Attributes:
        squares: number of sums of squares that the last run rewrote.
        gathers: number of gathers of channels that it rewrote.
        own: number of these gathers that became a call of our kernel.
    """

    def __init__(
        self,
        decompositions: Callable[[], dict[Any, Callable[..., Any]]],
    ) -> None:
        super().__init__()
        self._replacer = Replacer(decompositions)
        self.squares = self.gathers = self.own = 0

    def identity(self) -> str:
        """Return a constant: the rewrite depends only on the graph."""
        return "gradients of batch norms"

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite sums of squared gradients over all dimensions except 1, then gathers."""
        self.squares = self.gathers = self.own = 0
        for node in graph.find_nodes(op="call_function", target=aten.pow.Tensor_Scalar):
            if not node.meta.get(INSERTED_KEY) or node.args[1] != 2:
                continue
            match = match_norm_gradient_maybe(node.args[0])
            total = _sum_by_channel_maybe(node)
            if match is not None and total is not None:
                self._replace(total, _squares, (match.eps,), match.of_squares)
                self.squares += 1
        # Remove the squares: nothing uses them any longer.
        graph.eliminate_dead_code()
        for node in graph.find_nodes(op="call_function", target=aten.index.Tensor):
            gather = _gather_maybe(node)
            if gather is None:
                continue
            of, order, dtype = gather.gradient, gather.order, node.meta["val"].dtype
            if gather.written is None:
                inputs = gather.indices, of.g, of.x, *of.constants
                self._replace(node, _kept, (order, dtype), inputs)
            else:
                own = gather.written
                constants = *of.constants, *own.affine
                settings = order, len(constants), own.positions
                inputs = gather.indices, own.g, own.x, *constants, *own.excitation
                self._replace(node, _kept_by_own_kernel, settings, inputs)
                self.own += 1
            self.gathers += 1
        rewritten = self.squares + self.gathers
        return PassSummary(rewritten, rewritten)

    def _replace(
        self,
        node: fx.Node,
        function: Callable[..., Any],
        settings: tuple[Any, ...],
        inputs: Sequence[fx.Node],
    ) -> None:
        """Replace a node with a function of some settings and nodes."""
        fn, key = functools.partial(function, *settings), (function, str(settings))
        (replacement,) = self._replacer.insert(node, fn, inputs, key)
        assert replacement is not None
        replace_node(node, replacement)


def _squares(eps: float, *tensors: Tensor) -> tuple[Tensor]:
    """Return the sums of the squares, [C], from the `of_squares` of a `NormGradient`."""
    g, scale, mean_g, projection, total, dot, inverse_std = tensors
    s, m, p, inverse = (x.reshape(-1) for x in (scale, mean_g, projection, inverse_std))
    left = (g * g).sum(all_but(g, 1)) - m * total - p * dot * (1 + eps * inverse * inverse)
    # Rounding may make it slightly negative.
    return (s * s * left.clamp(min=0),)


def _kept(
    order: list[int],
    dtype: torch.dtype,
    indices: Tensor,
    g: Tensor,
    x: Tensor,
    *constants: Tensor,
) -> tuple[Tensor]:
    """Return the channels `indices` of the gradient; `order` puts channels last."""
    g, x = g.permute(order), x.permute(order)
    if g.is_cpu:
        columns: Sequence[Tensor] = gather_columns(constants, indices)
    else:
        columns = [column.reshape(-1)[indices] for column in constants]
    return (norm_gradient(g[..., indices], x[..., indices], columns).to(dtype),)


def _kept_by_own_kernel(
    order: list[int], count: int, positions: float, indices: Tensor, *tensors: Tensor
) -> tuple[Tensor]:
    """Return the same as `_kept`, from a `Written`'s g and x, `count` constants and excitation."""
    g, x, *rest = tensors
    constants, excitation = rest[:count], rest[count:]
    if excitation:
        excitation[1] = excitation[1] / positions
    return (
        gather_norm_gradient(g.permute(order), x.permute(order), constants, excitation, indices),
    )


def _gather_maybe(node: fx.Node) -> Gather | None:
    """Return what a node gathers, if it should rather gather the gradient's parts.

    None for any other node, if channels are not innermost in memory, or if the gradient is written
    to memory because other nodes read it.
    """
    source, (*before, indices) = cast(tuple[fx.Node, list[Any]], node.args)
    val: Tensor = source.meta["val"]
    is_of_last = len(before) == val.ndim - 1 and not any(i is not None for i in before)
    if not node.meta.get(INSERTED_KEY) or not is_of_last or indices.meta["val"].ndim != 1:
        return None
    # A symbolic stride must not be compared.
    if not isinstance(val.stride(-1), int) or val.stride(-1) != 1:
        return None
    order, chain = list(range(val.ndim)), [source]
    if source.target is aten.permute.default:
        order, chain = cast(list[int], source.args[1]), [source, cast(fx.Node, source.args[0])]
    while chain[-1].target in CASTS:
        chain.append(cast(fx.Node, chain[-1].args[0]))
    gradient = match_norm_gradient_maybe(chain[-1])
    if gradient is None or order[-1] != 1 or any(len(link.users) > 1 for link in chain):
        return None
    dtypes = {part.meta["val"].dtype for part in gradient.constants}
    if len(dtypes) > 1 or gradient.x.meta["val"].shape != gradient.g.meta["val"].shape:
        return None
    written = gradient.written_maybe if val.is_cpu else None
    if written is not None and val.dtype in DTYPES:
        # With bfloat16 factors, products are rounded in between, which the kernel does not do.
        by_channel = *gradient.constants, *written.affine, *written.excitation
        is_single = all(part.meta["val"].dtype == torch.float32 for part in by_channel)
        read = [part.meta["val"] for part in (written.g, written.x)]
        if is_single and all(
            x.dtype == val.dtype and x.permute(order).is_contiguous() for x in read
        ):
            return Gather(gradient, indices, order, written)
    return Gather(gradient, indices, order, None)


def _sum_by_channel_maybe(node: fx.Node) -> fx.Node | None:
    """Return the node with a tensor's sums over all dimensions except 1, None if there is none."""
    left = all_but(node.meta["val"], 1)
    while left:
        users = list(node.users)
        if len(users) != 1 or users[0].target is not aten.sum.dim_IntList or len(users[0].args) > 2:
            return None
        node = users[0]
        # All sums except the last are over trailing dimensions, so dimension 1 stays in place.
        dims = cast(list[int], node.args[1])
        if not set(dims) <= set(left) or (len(dims) < len(left) and 0 in dims):
            return None
        left = [d for d in left if d not in dims]
    return node
