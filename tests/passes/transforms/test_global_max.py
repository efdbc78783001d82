"""Global max pooling: what is rewritten, what is left, and the gradients of the dense backward."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ssprop_passes.kernels.windows import ADD_WINDOWS
from ssprop_passes.transforms.global_max import GlobalMaxPass
from torch import Tensor, fx, nn
from torch.nn import functional

from ssprop_fx.compiler.inductor import compile_aot_eager

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool1d": lambda x: functional.max_pool1d(x, x.shape[2])[:, :, 0],
    "adaptive": lambda x: functional.adaptive_max_pool1d(x, 1).flatten(1),
    "max": lambda x: x.max(2).values,
}
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "scale": lambda x: x * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)[:, None] / 3,
    "dropout": lambda x: functional.dropout(torch.relu(x), 0.5, training=True),
    "gate of itself": lambda x: x * torch.sigmoid(x),
}


class Net(nn.Module):
    def __init__(self, between: str, pooling: str, **geometry: Any) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 4, 1)
        self.conv = nn.Conv1d(4, 6, **{"kernel_size": 3, **geometry})
        self.between, self.pooling = BETWEEN[between], POOLINGS[pooling]

    def forward(self, x: Tensor) -> Tensor:
        return self.pooling(self.between(self.conv(self.first(x)))).sin()


def rewritten_and_error(
    model: nn.Module, x: Tensor, backend: str = "aot_eager"
) -> tuple[Any, float]:
    """Return what the pass did, and the largest error of all gradients against eager torch."""
    model, x = model.double(), x.double().requires_grad_()
    want = copy.deepcopy(model)
    torch.manual_seed(1)
    want(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in want.parameters())]
    x.grad = None
    graph_pass = GlobalMaxPass()

    def compile_graph(gm: Any, inputs: Any) -> Any:
        return compile_aot_eager(gm, inputs, graph_pass, {})

    torch._dynamo.reset()
    options = {"options": {"joint_custom_pre_pass": graph_pass}}
    settings = options if backend == "inductor" else {"backend": compile_graph}
    compiled = torch.compile(model, **settings)
    torch.manual_seed(1)
    compiled(x).square().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    errors = []
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        errors.append(float((a - b).abs().max() / b.abs().max()))
    return graph_pass.summary, max(errors)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("between", BETWEEN)
def test_gradients_are_those_of_the_dense_backward(between: str, pooling: str) -> None:
    torch.manual_seed(0)
    summary, error = rewritten_and_error(Net(between, pooling), torch.randn(3, 3, 70))
    assert (summary.matched, summary.rewritten) == (2, 1)
    assert error < 1e-12


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"stride": 2},
        {"stride": 3, "padding": 2},
        {"stride": 2, "kernel_size": 5, "padding": 4},
        {"dilation": 3, "padding": 3},
        {"stride": 5, "dilation": 2},
        {"bias": False, "kernel_size": 1},
    ],
    ids=str,
)
def test_every_geometry(geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    summary, error = rewritten_and_error(Net("relu", "max", **geometry), torch.randn(3, 3, 200))
    assert summary.rewritten == 1
    assert error < 1e-12


@pytest.mark.parametrize("pooling", POOLINGS)
def test_inductor(pooling: str) -> None:
    torch.manual_seed(0)
    net = Net("relu", pooling, stride=2, padding=1)
    summary, error = rewritten_and_error(net, torch.randn(3, 3, 90), "inductor")
    assert summary.rewritten == 1
    assert error < 1e-12


class Widths(nn.Module):
    """Convolutions of three widths read one input, as for text."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 4, 1)
        self.convs = nn.ModuleList(nn.Conv1d(4, 5, width) for width in (3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([torch.relu(conv(x)).max(2).values for conv in self.convs], 1).sin()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_several_widths_read_one_input(backend: str) -> None:
    torch.manual_seed(0)
    summary, error = rewritten_and_error(Widths(), torch.randn(3, 3, 60), backend)
    assert summary.rewritten == 3
    assert error < 1e-12


class MalConv(nn.Module):
    """Bytes, a gate, wide windows (Raff et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 4, padding_idx=0)
        self.conv, self.gate = (nn.Conv1d(4, 8, 10, stride=10) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).transpose(1, 2)
        x = self.conv(x) * torch.sigmoid(self.gate(x))
        return self.head(functional.max_pool1d(x, x.shape[2])[:, :, 0])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_convolutions_under_one_pooling(backend: str) -> None:
    torch.manual_seed(0)
    model, words = MalConv().double(), torch.randint(257, (3, 500))
    want = copy.deepcopy(model)
    want(words).sin().sum().backward()
    graph_pass = GlobalMaxPass()
    # The windows of both are added to the same zeros.
    sums: list[int] = []
    torch._dynamo.reset()
    settings: dict[str, Any] = {"options": {"joint_custom_pre_pass": graph_pass}}
    if backend == "aot_eager":

        def and_count(graph: fx.Graph) -> None:
            graph_pass(graph)
            graph.eliminate_dead_code()
            sums.append(len(graph.find_nodes(op="call_function", target=ADD_WINDOWS)))

        settings = {"backend": lambda gm, inputs: compile_aot_eager(gm, inputs, and_count, {})}
    torch.compile(model, **settings)(words).sin().sum().backward()
    assert graph_pass.summary.rewritten == 2
    assert sums == ([1] if backend == "aot_eager" else [])
    for a, b in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


class Left(nn.Module):
    """Cases that stay as they are, each for a reason of its own."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case
        groups = 2 if case == "groups" else 1
        kind = nn.ConvTranspose1d if case == "transposed" else nn.Conv1d
        self.conv = kind(4, 4, 3, groups=groups)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.case == "ties":
            return y.amax(2)
        if self.case == "mean beside":
            return y.max(2).values + y.mean(2)
        if self.case == "windows":
            return functional.max_pool1d(y, 5)
        if self.case == "channels":
            return y.max(1).values
        if self.case == "batch norm":
            return self.norm(y).max(2).values
        if self.case == "shift":
            return (y + torch.roll(y, 1, 2)).max(2).values
        return y.max(2).values


@pytest.mark.parametrize(
    "case",
    [
        *("groups", "transposed", "ties", "mean beside", "windows", "channels", "batch norm"),
        *("shift", "short"),
    ],
)
def test_what_is_left(case: str) -> None:
    torch.manual_seed(0)
    length = 20 if case == "short" else 60
    summary, error = rewritten_and_error(Left(case), torch.randn(3, 4, length))
    assert (summary.matched, summary.rewritten) == (1, 0)
    (reason,) = summary.left
    assert ("few positions" in reason) == (case == "short")
    assert error < 1e-12


def test_low_precision_sums_in_float32() -> None:
    torch.manual_seed(0)
    model = Net("relu", "max", stride=1).to(torch.bfloat16)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    graph_pass = GlobalMaxPass()
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=lambda gm, inputs: compile_aot_eager(gm, inputs, graph_pass, {})
    )
    compiled(x).float().square().sum().backward()
    assert graph_pass.summary.rewritten == 1
    found = model.conv.weight.grad
    wide = copy.deepcopy(model).float()
    wide.zero_grad()
    wide(x.float()).square().sum().backward()
    expected = wide.conv.weight.grad
    assert found is not None
    assert expected is not None
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
