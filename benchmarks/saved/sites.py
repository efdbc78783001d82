"""Find the weight gradients that pruned inputs can be made for: linear layers, 1x1 convolutions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from ssprop_passes.graph.rewrite import (
    Replacer,
    inductor_decompositions,
    replace_node,
    replace_outputs,
)
from ssprop_passes.sites.conv_match import ConvMatch, match_conv_backward
from ssprop_passes.sites.linear_match import Product, match_linear_backward
from torch import Tensor, fx

__all__ = ["Site", "find_sites"]

aten = torch.ops.aten

_VIEWS = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default),
    *(aten.permute.default, aten.t.default, aten.transpose.int),
    *(aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim),
    *(aten.alias.default, aten.detach.default),
)


@dataclass(frozen=True)
class Site:
    """A layer's weight gradient, `rows(grad_output)^T used(rows(input))`.

    Attributes:
        node: the backward node that computes it.
        input: the layer's input.
        grad_output: the gradient of its output.
        rows: turns these into matrices of a row for each token or position.
        used: leaves out rows of the input that a stride skips.
        like_weight: turns [C, C_in] into the gradient that the graph wants.
        replace: makes the graph use another node's result in place of the gradient.
    """

    node: fx.Node
    input: fx.Node
    grad_output: fx.Node
    rows: Callable[[Tensor], Tensor]
    used: Callable[[Tensor], Tensor]
    like_weight: Callable[[Tensor], Tensor]
    replace: Callable[[fx.Node], None]

    @property
    def is_saved_anyway(self) -> bool:
        """Whether another backward node takes the input as it is, such as that of an attention."""
        return any(
            user.meta.get("partitioner_tag") == "is_backward"
            and user is not self.node
            and torch.Tag.pointwise not in getattr(user.target, "tags", ())
            and _linear_or_1x1(user) is None
            for user in _readers(_base(self.input))
        )


def find_sites(graph: fx.Graph) -> Iterator[Site]:
    """Yield the weight gradients of a joint graph."""
    for node in list(graph.nodes):
        site = _linear_or_1x1(node)
        # An input of the graph is there anyway.
        if site is not None and _base(site.input).op != "placeholder":
            yield site


def _linear_or_1x1(node: fx.Node) -> Site | None:
    conv = match_conv_backward(node)
    if conv is not None:
        return _conv_site(conv) if _is_1x1(conv) else None
    linear = match_linear_backward(node)
    if linear is None:
        return None
    product = linear.products[1]
    if product is None or product.node is not node:
        return None
    return _linear_site(product, linear.input)


def _linear_site(product: Product, input_: fx.Node) -> Site:
    def same(tensor: Tensor) -> Tensor:
        return tensor

    return Site(
        product.node,
        input_,
        product.grad_output,
        same,
        same,
        same if product.is_transposed else lambda gradient: gradient.t(),
        lambda other: replace_node(product.node, other),
    )


def _is_1x1(conv: ConvMatch) -> bool:
    geometry = conv.geometry
    return (
        max(conv.weight.meta["val"].shape[2:]) == 1
        and max(geometry.padding) == 0
        and geometry.groups == 1
        and not geometry.transposed
        and conv.output_mask[1]
    )


def _conv_site(conv: ConvMatch) -> Site:
    at = (slice(None), *(slice(None, None, step) for step in conv.geometry.stride))
    shape = conv.weight.meta["val"].shape
    size, _, *space = conv.input.meta["val"].shape

    def rows(tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])

    def used(matrix: Tensor) -> Tensor:
        if max(conv.geometry.stride) == 1:
            return matrix
        return matrix.view(size, *space, -1)[at].reshape(-1, matrix.shape[1])

    def replace(gradient: fx.Node) -> None:
        of_input, _, of_bias = conv.output_mask
        found = Replacer(inductor_decompositions).insert(
            conv.node,
            lambda grad_output, weight: (
                _grad_input(grad_output, weight, conv.geometry.stride, space) if of_input else None,
                rows(grad_output).sum(0) if of_bias else None,
            ),
            [conv.grad_output, conv.weight],
        )
        replace_outputs(conv.node, (found[0], gradient, found[1]))
        conv.node.graph.erase_node(conv.node)

    return Site(
        conv.node,
        conv.input,
        conv.grad_output,
        rows,
        used,
        lambda gradient: gradient.reshape(shape),
        replace,
    )


def _grad_input(
    grad_output: Tensor, weight: Tensor, stride: Sequence[int], space: Sequence[int]
) -> Tensor:
    """Return the gradient of a 1x1 convolution's input, for which the input is not needed."""
    zeros, ones = [0] * len(space), [1] * len(space)
    sizes = zip(space, grad_output.shape[2:], stride, strict=True)
    more = [size - (outputs - 1) * step - 1 for size, outputs, step in sizes]
    gradient: Tensor = aten.convolution(
        grad_output, weight, None, stride, zeros, ones, True, more, 1
    )
    return gradient


def _base(node: fx.Node) -> fx.Node:
    """Return the node that a node is a view of."""
    while node.target in _VIEWS:
        node = cast(fx.Node, node.args[0])
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the users of a node and of its views, without the views."""
    for user in node.users:
        if user.target in _VIEWS:
            yield from _readers(user)
        else:
            yield user
