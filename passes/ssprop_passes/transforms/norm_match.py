"""Find a batch norm's gradient in a joint graph by what it computes, and take it apart."""

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

# The norm itself reads g this often: for the sum, for the products with x, and in the gradient.
_READS = 3


@dataclass(frozen=True)
class Written:
    """Tensors that are in memory anyway, and from which a batch norm's gradient can be computed.

    Attributes:
        g: gradient of the norm's output; or, if a ReLU, squeeze and excitation, or both in this
            order follow the norm, gradient of their output.
        x: the norm's input.
        affine: with a ReLU, the norm's 1 / std, weight and bias, applied to the centred input in
            this order. Each has one number per channel, in any shape that broadcasts. They replace
            the ReLU's output, which may not be in memory.
        excitation: a factor of g, and an addend that is spread over `positions`. Each has one
            number per sample and channel. Empty without squeeze and excitation.
        positions: number of positions per sample.
    """

    g: fx.Node
    x: fx.Node
    affine: tuple[fx.Node, ...] = ()
    excitation: tuple[fx.Node, ...] = ()
    positions: float = 1


@dataclass(frozen=True)
class NormGradient:
    """The parts of the input gradient of a batch norm in train mode.

    Attributes:
        g: gradient of the norm's output, [N, C, *space].
        x: the norm's input, [N, C, *space].
        scale, mean, mean_g, projection: s, mean, m and p of `BatchNormGradientPass`'s module, one
            number per channel, in any shape that broadcasts.
        total, dot: `sum(g)` and `sum(g * (x - mean))`, [C].
        inverse_std: 1 / std, C elements.
        eps: the number added to the variance.
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
        """What the sums of squares are computed from, except `eps`."""
        parts = self.scale, self.mean_g, self.projection, self.total, self.dot, self.inverse_std
        return self.g, *parts

    @property
    def constants(self) -> tuple[fx.Node, ...]:
        """The gradient's operands with one number per channel."""
        return self.scale, self.mean, self.mean_g, self.projection

    @property
    def written_maybe(self) -> Written | None:
        """What the gradient can be computed from that is in memory anyway, None if it is not.

        g is in memory if other nodes read it too, or if it is a result of an operator that no
        compiler fuses with the nodes that read it. Else such an operator may return the gradient
        of a ReLU, or of squeeze and excitation, after the norm. Under autocast these are the
        tensors before their cast for the sums, in the dtype that they have in memory.
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
        """Return the `affine` of a `Written` if a node is the norm's output, else None."""
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
        """Whether a node outside this norm reads g, or what g is cast from."""
        node, own_reads = self.g, _READS
        while True:
            if sum(not user.meta.get(INSERTED_KEY) for user in node.users) > own_reads:
                return True
            if node.target not in CASTS:
                return False
            node, own_reads = cast(fx.Node, node.args[0]), 1


def match_norm_gradient_maybe(node: Any) -> NormGradient | None:
    """Return the parts of a batch norm's gradient, None for any other node.

    This recognises the decomposition of `aten.native_batch_norm_backward`, and looks through casts:
    under autocast the final gradient is rounded, but the sums are over unrounded numbers.

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
    # If the sums are not means over all positions of a channel, this is not a batch norm.
    if eps is None or not isinstance(share, float) or share != 1 / count:
        return None
    if any(part.meta["val"].numel() != val.shape[1] for part in known):
        return None
    return NormGradient(g, x, *known, eps)


def _masked_maybe(g: fx.Node) -> tuple[fx.Node | None, Any]:
    """Return the input and output gradient of the ReLU that masks `g`, else (None, None)."""
    condition, zero, grad = _three(g, aten.where.self)
    activation, bound = operands(condition, aten.le.Scalar)
    relu = strip(activation, _ALIASES)
    targets = [getattr(node, "target", None) for node in (relu, zero)]
    if targets != [aten.relu.default, aten.scalar_tensor.default]:
        return None, None
    return (relu.args[0], grad) if bound == 0 and zero.args[0] == 0 else (None, None)


def _excited(g: Any) -> tuple[Any, tuple[fx.Node, ...], float]:
    """Split `g` into a `Written`'s g, excitation and positions; `g`, (), 1 without excitation."""
    product, spread = operands(g, aten.add.Tensor)
    grad, factor = operands(product, aten.mul.Tensor)
    expanded, positions = operands(spread, aten.div.Scalar)
    total, _ = operands(expanded, aten.expand.default)
    if grad is None or total is None or not isinstance(positions, (int, float)):
        return g, (), 1
    size = grad.meta["val"].shape
    of_samples = [*size[:2], *[1] * (len(size) - 2)]
    for node in (factor, total):
        # Symbolic sizes must be compared without a guard.
        found = node.meta["val"].shape if isinstance(node, fx.Node) else ()
        is_same = [statically_known_true(a == b) for a, b in zip(found, of_samples, strict=False)]
        if len(found) != len(size) or not all(is_same):
            return g, (), 1
    return grad, (factor, total), positions


def _eps_maybe(x: fx.Node, mean: fx.Node, inverse_std: fx.Node) -> float | None:
    """Return the eps added to the variance of `x`, None if these are not its mean and 1 / std."""
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
    """Return what a node sums over all dimensions except 1, None for any other node."""
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
    """Return the three operands of a node that calls `target`, three None for any other."""
    return node.args if isinstance(node, fx.Node) and node.target is target else (None,) * 3


def strip(node: Any, targets: Sequence[Any]) -> Any:
    """Return the node before a chain of calls of `targets` that ends in `node`."""
    while isinstance(node, fx.Node) and node.target in targets:
        node = node.args[0]
    return node
