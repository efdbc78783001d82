"""Find the backward of linear layers in a joint graph.

A linear call y = x m + b has three backward nodes: two matrix products and a sum. The products are
found by the operands that they share with the forward product. `nn.Linear` has m = w^T, other
layers have m itself as their weight, such as the `Conv1D` of GPT-2. Autograd computes the transpose
of a gradient if the operand that the gradient belongs to is a transpose:

    dx = mm(dy, t(m))       or   dx = t(mm(m, t(dy)))
    dm = mm(t(x), dy)       or   dm = t(mm(t(dy), x)), as for `nn.Linear`

A product of two activations, as in attention, belongs to no layer and has no slot.
"""

from collections.abc import Hashable, Iterator, Sequence
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
class Product:
    """A backward product of a linear call.

    Attributes:
        node: the product.
        operand: which operand of the forward product it is the gradient of: 0 for x, 1 for m.
        is_transposed: whether it computes the transpose of that gradient.
        grad_output: dy.
        forward: the forward product.
    """

    node: fx.Node
    operand: int
    is_transposed: bool
    grad_output: fx.Node
    forward: fx.Node


@dataclass(frozen=True)
class LinearMatch(SiteMatch):
    """The backward products of one linear call.

    Attributes:
        node: the first product in the graph.
        grad_output, input: [T, C] and [T, C_in].
        transposed_weight: m, [C_in, C], as the forward product takes it.
        products: that of the input gradient and that of the gradient of m, None if not computed.
    """

    node: fx.Node
    grad_output: fx.Node
    input: fx.Node
    transposed_weight: fx.Node
    products: tuple[Product | None, Product | None]

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
        of_input, of_weight = self.products
        return of_input is not None, of_weight is not None, self.bias_sum is not None

    @property
    def form(self) -> Hashable:
        """Which gradients are computed, which as a transpose, and the shape of the bias's."""
        bias_sum = self.bias_sum
        transposed = [product and product.is_transposed for product in self.products]
        return self.wanted, *transposed, None if bias_sum is None else bias_sum.meta["val"].shape

    def flops_of(self, mask: Sequence[bool]) -> int:
        """Return the FLOPs of the products."""
        outputs = hinted(self.grad_output.meta["val"]).numel()
        features = int(self.transposed_weight.meta["val"].shape[0])
        return 2 * int(outputs) * features * sum(mask[:2])

    @property
    def nodes(self) -> Sequence[fx.Node]:
        """The products."""
        return tuple(product.node for product in self.products if product is not None)

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
    def _dense_nodes(self) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None]:
        of_input, of_weight = (None if p is None else p.node for p in self.products)
        return of_input, of_weight, self.bias_sum

    @property
    def dense_gradients(self) -> Gradients:
        """The fake values of the products and the sum."""
        return cast(
            Gradients, tuple(None if n is None else n.meta["val"] for n in self._dense_nodes)
        )

    def backward(
        self, k: int, selection: Selection, *tensors: Tensor, memory: Tensor | None = None
    ) -> Gradients:
        """Return the sparse gradients, each in the form of the product or sum that it replaces."""
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
        of_input, of_weight = self.products
        if grad_input is not None and of_input is not None and of_input.is_transposed:
            grad_input = grad_input.t()
        # The rows of the gradient are channels, so it is the transpose of the gradient of m.
        if grad_weight is not None and of_weight is not None and not of_weight.is_transposed:
            grad_weight = grad_weight.t()
        return grad_input, grad_weight, self._like_sum(grad_bias)

    def _like_sum(self, grad_bias: Tensor | None) -> Tensor | None:
        """Return the bias gradient in the shape of the sum that it replaces."""
        if grad_bias is None:
            return None
        return grad_bias.view(cast(fx.Node, self.bias_sum).meta["val"].shape)

    def replace(self, gradients: Sequence[fx.Node | None]) -> None:
        """Replace the products and the sum with the sparse gradients."""
        for node, gradient in zip(self._dense_nodes, gradients, strict=True):
            if gradient is not None:
                replace_node(cast(fx.Node, node), gradient)
            elif node is not None:
                # The node stays dense, and must not be matched again.
                node.meta[INSERTED_KEY] = True


def match_linear_backward(node: fx.Node) -> LinearMatch | None:
    """Return the match of a linear call's backward if `node` is one of its products, else None."""
    first = _product_maybe(node)
    if first is None:
        return None
    input_, transposed_weight = cast(tuple[fx.Node, fx.Node], first.forward.args[-2:])
    if not all(isinstance(size, int) for size in transposed_weight.meta["val"].shape):
        # A product of two activations: to compare its sizes would fix the batch size.
        return None
    found: dict[int, Product] = {}
    for user in _users_of(first.grad_output):
        product = _product_maybe(user, first.grad_output)
        if product is not None and product.forward is first.forward:
            found.setdefault(product.operand, product)
    if node not in [product.node for product in found.values()]:
        return None
    products = found.get(0), found.get(1)
    return LinearMatch(node, first.grad_output, input_, transposed_weight, products)


def _product_maybe(node: fx.Node, grad_output: fx.Node | None = None) -> Product | None:
    """Return what a node computes of a linear call's backward; None if it is no part of any.

    Args:
        node: a node.
        grad_output: the gradient of the call's output, if it is known.
    """
    if (
        node.target is not aten.mm.default
        or node.meta.get("partitioner_tag") != "is_backward"
        or node.meta.get(INSERTED_KEY)
    ):
        return None
    for operand, is_transposed, gradient, shared in _readings(node):
        if gradient is None or shared is None or grad_output not in (None, gradient):
            continue
        forward = _forward_maybe(shared, 1 - operand, node)
        if forward is not None:
            return Product(node, operand, is_transposed, gradient, forward)
    return None


def _readings(node: fx.Node) -> Iterator[tuple[int, bool, fx.Node | None, fx.Node | None]]:
    """Yield what a product may be: operand, is_transposed, dy, and the forward's other operand."""
    left, right = cast(tuple[fx.Node, fx.Node], node.args)
    yield 1, True, _transposed_maybe(left), right
    yield 0, False, left, _transposed_maybe(right)
    yield 1, False, right, _transposed_maybe(left)
    yield 0, True, _transposed_maybe(right), left


def _users_of(grad_output: fx.Node) -> Iterator[fx.Node]:
    """Yield the users of a gradient, and those of its transposes."""
    for user in grad_output.users:
        yield user
        if _transposed_maybe(user) is grad_output:
            yield from user.users


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
            # Both come from the same autograd call.
            and user.meta.get("seq_nr") == backward.meta.get("seq_nr")
        ):
            return user
    return None
