"""Find the backward of linear layers in a joint graph.

A linear call y = x w^T + b has three backward nodes: two matrix products and a sum. They are found
by the operands that they share with the forward product. A product of two activations, as in
attention, belongs to no layer and has no slot.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from ssprop_passes.graph.rewrite import INSERTED_KEY, find_sum_maybe, replace_node
from ssprop_passes.replacements.gradients import Gradients
from ssprop_passes.replacements.linear import sparse_linear_backward
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.flops import hinted
from ssprop_passes.sites.match import SiteMatch

__all__ = ["LinearMatch", "match_linear_backward"]

aten = torch.ops.aten

# Operators between the gradient that the bias sum reads and the one that the products read.
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.clone.default)


@dataclass(frozen=True)
class LinearMatch(SiteMatch):
    """The backward products of one linear call.

    Attributes:
        node: the first product in the graph.
        grad_output, input: [T, C] and [T, C_in].
        transposed_weight: [C_in, C], as the forward product takes it.
        grad_input_node, grad_weight_node: the products, None if not computed.
    """

    node: fx.Node
    grad_output: fx.Node
    input: fx.Node
    transposed_weight: fx.Node
    grad_input_node: fx.Node | None
    grad_weight_node: fx.Node | None

    @property
    def kind(self) -> str:
        """`linear`."""
        return "linear"

    @property
    def channels(self) -> int:
        """Output features, C."""
        return int(self.transposed_weight.meta["val"].shape[1])

    @property
    def groups(self) -> int:
        """Always 1."""
        return 1

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """Which of the two products and the sum exist."""
        return (
            self.grad_input_node is not None,
            self.grad_weight_node is not None,
            self.bias_sum is not None,
        )

    @property
    def form(self) -> Hashable:
        """Which gradients are computed, and the shape of the bias gradient."""
        bias_sum = self.bias_sum
        return self.wanted, None if bias_sum is None else bias_sum.meta["val"].shape

    def flops_of(self, mask: Sequence[bool]) -> int:
        """Return the FLOPs of the products."""
        outputs = hinted(self.grad_output.meta["val"]).numel()
        features = int(self.transposed_weight.meta["val"].shape[0])
        return 2 * int(outputs) * features * sum(mask[:2])

    @property
    def nodes(self) -> Sequence[fx.Node]:
        """The products."""
        nodes = (self.grad_input_node, self.grad_weight_node)
        return tuple(node for node in nodes if node is not None)

    @property
    def inputs(self) -> Sequence[fx.Node]:
        """grad_output, input and transposed weight."""
        return self.grad_output, self.input, self.transposed_weight

    @property
    def bias_sum(self) -> fx.Node | None:
        """The sum that computes the bias gradient, None if there is none.

        It sums grad_output or, if the bias was added with unflattened leading dimensions, the
        tensor that grad_output is a view or a contiguous copy of.
        """
        source: Any = self.grad_output
        while isinstance(source, fx.Node) and source.meta["val"].shape[-1] == self.channels:
            found = find_sum_maybe(source, source.meta["val"].ndim - 1, self.node)
            if found is not None or source.target not in _RESHAPES:
                return found
            source = source.args[0]
        return None

    @property
    def dense_gradients(self) -> Gradients:
        """The fake values of the products and the sum."""
        nodes = (self.grad_input_node, self.grad_weight_node, self.bias_sum)
        return cast(Gradients, tuple(None if n is None else n.meta["val"] for n in nodes))

    def backward(
        self, k: int, selection: Selection, *tensors: Tensor, memory: Tensor | None = None
    ) -> Gradients:
        """Return the sparse gradients; the bias gradient has the shape of the sum it replaces."""
        grad_output, input_, transposed_weight = tensors
        grad_input, grad_weight, grad_bias = sparse_linear_backward(
            grad_output,
            input_,
            transposed_weight.t(),
            k,
            selection.sparse(self.wanted),
            selection,
            memory,
        )
        return grad_input, grad_weight, self._like_sum(grad_bias)

    def _like_sum(self, grad_bias: Tensor | None) -> Tensor | None:
        """Return the bias gradient in the shape of the sum that it replaces."""
        if grad_bias is None:
            return None
        return grad_bias.view(cast(fx.Node, self.bias_sum).meta["val"].shape)

    def replace(self, gradients: Sequence[fx.Node | None]) -> None:
        """Replace the products and the sum with the sparse gradients."""
        nodes = (self.grad_input_node, self.grad_weight_node, self.bias_sum)
        for node, gradient in zip(nodes, gradients, strict=True):
            if gradient is not None:
                replace_node(cast(fx.Node, node), gradient)
            elif node is not None:
                # The node stays dense, and must not be matched again.
                node.meta[INSERTED_KEY] = True


def match_linear_backward(node: fx.Node) -> LinearMatch | None:
    """Return the match of a linear call's backward if `node` is one of its products, else None."""
    if not _is_backward_product(node):
        return None
    left, right = cast(tuple[fx.Node, fx.Node], node.args)
    # dw = mm(t(dy), x) shares x with the forward product; dx = mm(dy, t(w^T)) shares w^T.
    if (grad_output := _transposed_maybe(left)) is not None:
        forward = _forward_maybe(right, 0, node)
    else:
        grad_output, weight = left, _transposed_maybe(right)
        forward = None if weight is None else _forward_maybe(weight, 1, node)
    if forward is None:
        return None
    input_, transposed_weight = cast(tuple[fx.Node, fx.Node], forward.args[-2:])
    if not all(isinstance(size, int) for size in transposed_weight.meta["val"].shape):
        # A product of two activations: to compare its sizes would fix the batch size.
        return None
    products = [n for n in grad_output.users if _is_backward_product(n) and _same_call(n, node)]
    products += [
        n
        for user in grad_output.users
        if _transposed_maybe(user) is grad_output
        for n in user.users
        if _is_backward_product(n) and _same_call(n, node)
    ]
    by_weight = [n for n in products if _transposed_maybe(n.args[1]) is transposed_weight]
    by_input = [n for n in products if n.args[1] is input_]
    grad_input_node = by_weight[0] if by_weight else None
    grad_weight_node = by_input[0] if by_input else None
    if node not in (grad_input_node, grad_weight_node):
        return None
    return LinearMatch(
        node, grad_output, input_, transposed_weight, grad_input_node, grad_weight_node
    )


def _is_backward_product(node: fx.Node) -> bool:
    return (
        node.target is aten.mm.default
        and node.meta.get("partitioner_tag") == "is_backward"
        and not node.meta.get(INSERTED_KEY)
    )


def _same_call(node: fx.Node, other: fx.Node) -> bool:
    """Say whether two nodes come from the same autograd call."""
    return node.meta.get("seq_nr") == other.meta.get("seq_nr")


def _transposed_maybe(node: object) -> fx.Node | None:
    """Return what a node is the matrix transpose of, None if it is no transpose."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.t.default or (
        node.target is aten.permute.default and node.args[1] == [1, 0]
    ):
        return cast(fx.Node, node.args[0])
    return None


def _forward_maybe(operand: fx.Node, position: int, backward: fx.Node) -> fx.Node | None:
    """Return the forward product of the call that takes `operand` at `position`."""
    for user in operand.users:
        if (
            user.target in (aten.mm.default, aten.addmm.default)
            and user.args[-2:][position] is operand
            and user.meta.get("partitioner_tag") == "is_forward"
            and _same_call(user, backward)
        ):
            return user
    return None
