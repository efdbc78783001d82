"""Replacements are traced once for all inputs of one form, and each copy has its own values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import joint_graph, sparse_pass
from ssprop_passes.graph.rewrite import Replacer, replace_node
from ssprop_passes.sites.conv_match import ConvMatch
from ssprop_passes.sites.linear_match import LinearMatch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

aten = torch.ops.aten


class Rows:
    """A function of a tensor that counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        rows = x.sum(0).exp()
        return rows, rows.view(-1, 1)


def sines(*inputs: Tensor, mode: str = "fake") -> fx.GraphModule:
    return make_fx(lambda *xs: [x.sin() for x in xs], tracing_mode=mode)(*inputs)


def replace_sines(traced: fx.GraphModule, key: object) -> Rows:
    """Replace each sine with the first result of `Rows`."""
    rows, replacer = Rows(), Replacer(dict)
    for node in traced.graph.find_nodes(op="call_function", target=aten.sin.default):
        first, _ = replacer.insert(node, rows, [node.args[0]], key)
        replace_node(node, first)
    traced.graph.lint()
    traced.recompile()
    return rows


@pytest.mark.parametrize(
    ("others", "key", "calls"),
    [
        ([(3, 4), (3, 4)], "rows", 1),
        ([(3, 4), (5, 4)], "rows", 2),
        ([(3, 4), (3, 4)], None, 3),
    ],
)
def test_what_is_alike_is_traced_once(
    others: list[tuple[int, ...]], key: object, calls: int
) -> None:
    inputs = [torch.randn(shape) for shape in ((3, 4), *others)]
    traced = sines(*inputs)
    assert replace_sines(traced, key).calls == calls
    for found, x in zip(traced(*inputs), inputs, strict=True):
        torch.testing.assert_close(found, x.sum(0).exp())


@pytest.mark.parametrize(
    "other",
    [torch.randn(4, 3).t(), torch.randn(3, 4, dtype=torch.float64)],
    ids=["strides", "dtype"],
)
def test_tensors_that_differ_in_more_than_shape_are_not_alike(other: Tensor) -> None:
    assert replace_sines(sines(torch.randn(3, 4), other), "rows").calls == 2


def test_an_input_that_is_given_twice_is_not_like_two() -> None:
    """The order of the two calls does not matter."""
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for order in ((0, 1), (1, 0)):
        traced = sines(x, y)
        first, second = traced.graph.find_nodes(op="call_function", target=aten.sin.default)
        pairs = [(first.args[0], first.args[0]), (first.args[0], second.args[0])]
        replacer = Replacer(dict)
        for i in order:
            node = (first, second)[i]
            (difference,) = replacer.insert(node, lambda a, b: (a - 2 * b,), pairs[i], "same")
            replace_node(node, difference)
        traced.recompile()
        found = traced(x, y)
        torch.testing.assert_close(found[0], -x)
        torch.testing.assert_close(found[1], x - 2 * y)


def test_what_has_symbols_is_traced_anew() -> None:
    inputs = torch.randn(3, 4), torch.randn(3, 4)
    assert replace_sines(sines(*inputs, mode="symbolic"), "rows").calls == 2


def test_copies_have_fake_values_of_their_own() -> None:
    """Views share their owner's storage: later passes use storages to see what shares memory."""
    traced = sines(torch.randn(3, 4), torch.randn(3, 4))
    replace_sines(traced, "rows")
    exps = traced.graph.find_nodes(op="call_function", target=aten.exp.default)
    views = traced.graph.find_nodes(op="call_function", target=aten.view.default)
    owners = [node.meta["val"].untyped_storage()._cdata for node in exps]
    assert len(set(owners)) == 2
    assert [node.meta["val"].untyped_storage()._cdata for node in views] == owners
    assert all(node.meta["val"].shape == (4,) for node in exps)


def convolutions(*tensors: Tensor) -> Tensor:
    x, first, second, third = tensors
    x = functional.conv2d(x, first, padding=1).tanh()
    x = functional.conv2d(x, second, padding=1).tanh()
    return functional.conv2d(x, third, padding=2, dilation=2)


def linears(*tensors: Tensor) -> Tensor:
    x, first, first_bias, second, second_bias, third = tensors
    x = functional.linear(x, first, first_bias).tanh()
    x = functional.linear(x, second, second_bias).tanh()
    return functional.linear(x, third)


@pytest.mark.parametrize(
    ("fn", "shapes", "match"),
    [
        (convolutions, [(2, 6, 5, 5), *[(6, 6, 3, 3)] * 3], ConvMatch),
        (linears, [(2, 5, 6), *[(6, 6), (6,)] * 2, (6, 6)], LinearMatch),
    ],
    ids=["conv", "linear"],
)
def test_alike_layers_get_what_they_would_each_by_itself(
    fn: Callable[..., Tensor],
    shapes: list[tuple[int, ...]],
    match: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two of the three layers are alike."""
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    traces: list[object] = []
    trace = Replacer._trace

    def counted(*args: Any) -> fx.GraphModule:
        traces.append(args)
        return trace(*args)

    monkeypatch.setattr(Replacer, "_trace", counted)

    def run(forms: Callable[..., Any]) -> tuple[list[str], tuple[Tensor | None, ...]]:
        monkeypatch.setattr(match, "form", forms)
        sparse = sparse_pass(6)
        sparse.constants = (2,)
        graph, gradients = joint_graph(fn, tensors, 1, sparse)
        values = ((node.format_node(), str(node.meta.get("val"))) for node in graph.nodes)
        return [" ".join(map(str, value)) for value in values], gradients

    told = run(match.form)
    assert len(traces) == 2
    alone = run(property(lambda match: None))
    assert len(traces) == 2 + 3
    assert told[0] == alone[0]
    torch.testing.assert_close(told[1], alone[1], rtol=0, atol=0)
