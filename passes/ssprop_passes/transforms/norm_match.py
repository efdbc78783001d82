"""A batch norm's gradient, taken apart: found in a joint graph by what it computes."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ssprop_passes.graph.rewrite import INSERTED_KEY
from ssprop_passes.selection.scores import all_but

__all__ = ["CASTS", "NormGradient", "match_norm_gradient_maybe", "operands", "strip"]

aten = torch.ops.aten

CASTS = (torch.ops.prims.convert_element_type.default,)
_VIEWS = (aten.unsqueeze.default, aten.squeeze.dims, aten.view.default)
_ALIASES = (aten.alias.default, aten.detach.default)

# The norm itself reads g for its sum, for its products with x and in the gradient.
_READS = 3


@dataclass(frozen=True)
class Written:
    """Tensors that a batch norm's gradient can be read from, which lie in memory anyway.

    Attributes:
        g: gradient of the norm's output; or of what a ReLU, or squeeze and excitation, or both in
            this order, make of that output.
        x: the norm's input.
        affine: with a ReLU, what the norm multiplies its input by once that is centred: first
            1 / std, then its weight; and its bias. One number a channel each, in any shape that
            broadcasts. The ReLU's own output is not read: it may lie nowhere in memory.
        excitation: what g is multiplied by, and what is then added, spread over `positions`; one
            number a sample and channel each. Neither without squeeze and excitation.
        positions: of a sample.
    """

    g: fx.Node
    x: fx.Node
    affine: tuple[fx.Node, ...] = ()
    excitation: tuple[fx.Node, ...] = ()
    positions: float = 1


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

    @property
    def written_maybe(self) -> Written | None:
        """What the gradient can be read from that lies in memory anyway, None if that is not so.

        That is g, if others read it as well, or an operator returns it that no compiler fuses with
        what reads it; or such a gradient of what a ReLU, and squeeze and excitation, make of the
        norm's output. Under autocast these are what was cast to be summed, in the dtype that it
        has in memory.
        """
        g, x = strip(self.g, CASTS), strip(self.x, CASTS)
        if g.target is operator.getitem or self._is_read_elsewhere:
            return Written(g, x)
        activated, grad = _masked_maybe(g)
        affine = self._affine_maybe(activated)
        grad, excitation, positions = _excited(g if affine is None else grad)
        if getattr(grad, "target", None) is not operator.getitem:
            return None
        return Written(grad, x, affine or (), excitation, positions)

    def _affine_maybe(self, node: Any) -> tuple[fx.Node, ...] | None:
        """Return the `affine` of a `Written` where a node is the norm's output, else None."""
        scaled, bias = operands(strip(node, CASTS), aten.add.Tensor)
        normalised, weight = operands(scaled, aten.mul.Tensor)
        centred, inverse_std = operands(normalised, aten.mul.Tensor)
        x, mean = operands(centred, aten.sub.Tensor)
        pairs = (x, self.x), (mean, self.mean), (inverse_std, self.inverse_std)
        looked_through = _VIEWS + CASTS
        if any(strip(a, looked_through) is not strip(b, looked_through) for a, b in pairs):
            return None
        return inverse_std, weight, bias

    @property
    def _is_read_elsewhere(self) -> bool:
        """Whether anything but this norm reads g, or what g is cast from."""
        node, own_reads = self.g, _READS
        while True:
            if sum(not user.meta.get(INSERTED_KEY) for user in node.users) > own_reads:
                return True
            if node.target not in CASTS:
                return False
            node, own_reads = cast(fx.Node, node.args[0]), 1


def match_norm_gradient_maybe(node: Any) -> NormGradient | None:
    """Return the parts of a batch norm's gradient, None for any other node.

    As the decomposition of `aten.native_batch_norm_backward` computes it. Casts are looked through:
    under autocast the gradient is rounded at its end, and the sums are those of what was not.

    Args:
        node: a node of a joint graph.
    """
    dy = strip(node, CASTS)
    centred, scale = operands(dy, aten.mul.Tensor)
    projected_out, mean_g = operands(centred, aten.sub.Tensor)
    g, along = operands(projected_out, aten.sub.Tensor)
    x_centred, projection = operands(along, aten.mul.Tensor)
    x, mean = operands(x_centred, aten.sub.Tensor)

    total, share = operands(strip(mean_g, _VIEWS), aten.mul.Tensor)
    dot_share, inverse_variance = operands(strip(projection, _VIEWS), aten.mul.Tensor)
    dot, same_share = operands(dot_share, aten.mul.Tensor)
    inverse_std, same_std = operands(inverse_variance, aten.mul.Tensor)
    same_g, same_x = operands(_summed(dot), aten.mul.Tensor)
    known = (scale, mean, mean_g, projection, total, dot, inverse_std)
    if None in (g, x, *known) or inverse_std is not same_std or share != same_share:
        return None
    if _summed(total) is not g or same_g is not g or operands(same_x, aten.sub.Tensor)[0] is not x:
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


def _masked_maybe(g: fx.Node) -> tuple[fx.Node | None, Any]:
    """Return a ReLU's input, and the gradient of its output that `g` masks; None, None if none."""
    condition, zero, grad = _three(g, aten.where.self)
    activation, bound = operands(condition, aten.le.Scalar)
    relu = strip(activation, _ALIASES)
    targets = [getattr(node, "target", None) for node in (relu, zero)]
    if targets != [aten.relu.default, aten.scalar_tensor.default]:
        return None, None
    return (relu.args[0], grad) if bound == 0 and zero.args[0] == 0 else (None, None)


def _excited(g: Any) -> tuple[Any, tuple[fx.Node, ...], float]:
    """Return `g` as a `Written` has it: its g, excitation and positions; itself if that is all."""
    product, spread = operands(g, aten.add.Tensor)
    grad, factor = operands(product, aten.mul.Tensor)
    expanded, positions = operands(spread, aten.div.Scalar)
    total, _ = operands(expanded, aten.expand.default)
    if grad is None or total is None or not isinstance(positions, (int, float)):
        return g, (), 1
    size = grad.meta["val"].shape
    of_samples = [*size[:2], *[1] * (len(size) - 2)]
    for node in (factor, total):
        # Sizes that are no numbers yet are not to be asked about.
        found = node.meta["val"].shape if isinstance(node, fx.Node) else ()
        is_same = [statically_known_true(a == b) for a, b in zip(found, of_samples, strict=False)]
        if len(found) != len(size) or not all(is_same):
            return g, (), 1
    return grad, (factor, total), positions


def _eps_maybe(x: fx.Node, mean: fx.Node, inverse_std: fx.Node) -> float | None:
    """Return what was added to the variance of `x`, None if these are not its mean and 1 / std."""
    root = strip(inverse_std, _VIEWS + CASTS)
    if not isinstance(root, fx.Node) or root.target is not aten.rsqrt.default:
        return None
    variance, eps = operands(root.args[0], aten.add.Tensor)
    moments, is_mean = operands(strip(mean, _VIEWS + CASTS), operator.getitem)
    same_moments, is_variance = operands(strip(variance, _VIEWS), operator.getitem)
    if moments is None or moments is not same_moments or (is_variance, is_mean) != (0, 1):
        return None
    if moments.target is not aten.var_mean.correction or moments.kwargs.get("correction") != 0:
        return None
    of = cast(fx.Node, moments.args[0])
    over = moments.args[1]
    is_of_x = strip(of, CASTS) is strip(x, CASTS) and over == all_but(of.meta["val"], 1)
    return eps if is_of_x and isinstance(eps, float) else None


def _summed(node: Any) -> Any:
    """Return what a node sums over all dimensions but 1, None for any other node."""
    is_sum = isinstance(node, fx.Node) and node.target is aten.sum.dim_IntList
    if not is_sum or len(node.args) > 2:
        return None
    x = node.args[0]
    return x if sorted(node.args[1]) == all_but(x.meta["val"], 1) else None


def operands(node: Any, target: Any) -> Sequence[Any]:
    """Return the two operands of a node that calls `target`, (None, None) for any other."""
    if isinstance(node, fx.Node) and node.target is target and not node.kwargs:
        return node.args
    return None, None


def _three(node: Any, target: Any) -> Sequence[Any]:
    """Return the three operands of a node that calls `target`, None for each of any other."""
    return node.args if isinstance(node, fx.Node) and node.target is target else (None,) * 3


def strip(node: Any, targets: Sequence[Any]) -> Any:
    """Return what a chain of such calls begins with."""
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node
