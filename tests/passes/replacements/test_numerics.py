"""Extreme, empty, tied and non-finite values, and hooks and modes of autograd, on small models."""

import math
from collections.abc import Iterator

import pytest
import torch
from graphs import small_net
from no_edit import EXACT, everywhere, loss
from oracle import SMALLEST, gradients, oracle_gradients, relative_error
from ssprop_passes.errors import NoEffectWarning
from ssprop_passes.replacements.linear import sparse_linear_backward
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.scores import SCORES
from ssprop_passes.selection.selectors import SELECTORS
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.runtime.module import SsPropModule

EVERY = [(select, score) for select in SELECTORS for score in SCORES]
HALF = [torch.float16, torch.bfloat16]


def make(model: nn.Module, rate: float = 0.5, backend: str = "aot_eager", **config: object):
    exact = {key: EXACT[key] for key in ("channel_multiple", "min_channels")}
    config = SparsityConfig(**exact, **config)
    return ssprop_compile(model, SparsityScheduler(constant(rate)), config=config, backend=backend)


def rows(weight: Tensor) -> list[int]:
    """Return the channels whose row of the weight gradient is not zero."""
    return weight.grad.flatten(1).ne(0).any(1).nonzero().flatten().tolist()


class Weighted(nn.Module):
    """A layer whose output gets the gradient that a test chooses."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return (self.layer(x) * weights).sum()


LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 16, 3), (2, 3, 6, 6), (2, 16, 4, 4), 1),
    "linear": (lambda: nn.Linear(5, 16), (4, 5), (4, 16), -1),
}


def backward(
    name: str, weights: Tensor, dtype: torch.dtype = torch.float32, **options: object
) -> tuple[nn.Module, Tensor]:
    """Run one sparse step of a layer whose output has this gradient; return it and its input."""
    make_layer, shape, _, _ = LAYERS[name]
    torch.manual_seed(1)
    model = Weighted(make_layer()).to(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    make(model, **options)(x, weights.to(dtype)).backward()
    return model.layer, x


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("select", "score"), EVERY)
def test_a_scaler_finds_every_value_that_is_not_finite(select: str, score: str, bad: float) -> None:
    _, _, shape, dim = LAYERS["linear"]
    weights = torch.rand(shape) + 0.5
    weights.select(dim, 11)[0] = bad
    # Without the bad channel, this finite channel would be kept before all others.
    weights.select(dim, 3).mul_(1e6)
    layer, _ = backward("linear", weights, rate=0.93, select=select, score=score)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes the scale
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert torch.equal(layer.weight, before)
    assert 11 in rows(layer.weight)
    assert len(rows(layer.weight)) == SMALLEST


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_a_value_that_is_not_finite_is_kept_under_inductor(name: str, bad: float) -> None:
    _, _, shape, dim = LAYERS[name]
    weights = torch.rand(shape)
    weights.select(dim, 5)[-1] = bad
    layer, _ = backward(name, weights, rate=0.93, select="random", backend="inductor")
    assert 5 in rows(layer.weight)
    assert len(rows(layer.weight)) == SMALLEST
    assert not layer.weight.grad[5].isfinite().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_scores_in_half_precision_neither_overflow_nor_vanish(
    score: str, dtype: torch.dtype
) -> None:
    """The sum of a channel is too large for fp16, and its mean too small."""
    large = torch.full((2, 8, 64, 64), 6e4).to(dtype)
    weight = torch.ones(8, 3).to(dtype)
    assert SCORES[score](large, weight).isfinite().all()
    single = torch.zeros(2, 8, 64, 64)
    single[0, 5, 3, 3] = 1e-4
    scores = SCORES[score](single.to(dtype), weight)
    assert scores.argmax() == 5
    assert scores[5] > 0


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1e18, "finite"), (2e19, "infinite"), (1e-22, "finite"), (1e-23, "zero")],
)
def test_range_of_l2_in_float32(scale: float, expected: str) -> None:
    score = SCORES["l2"](torch.full((2, 1, 4, 4), scale), torch.ones(1, 1))
    assert {0.0: "zero", float("inf"): "infinite"}.get(score.item(), "finite") == expected


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-42])
@pytest.mark.parametrize("name", LAYERS)
def test_huge_and_denormal_gradients_are_ranked(name: str, scale: float) -> None:
    _, _, shape, dim = LAYERS[name]
    order = torch.randperm(16)
    view = [1] * len(shape)
    view[dim] = 16
    weights = (torch.ones(shape).double() * (order + 1).view(view) * scale).float()
    layer, _ = backward(name, weights, rate=0.75, score="mean_abs")
    assert rows(layer.weight) == sorted((order >= 12).nonzero().flatten().tolist())
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize(("select", "score"), EVERY)
def test_zeros_and_ties_keep_as_many_as_always_and_stay_finite(select: str, score: str) -> None:
    _, _, shape, _ = LAYERS["conv"]
    for value in (0.0, 1.0):
        layer, x = backward("conv", torch.full(shape, value), select=select, score=score)
        assert layer.weight.grad.isfinite().all()
        assert x.grad.isfinite().all()
        assert len(rows(layer.weight)) == 8 * value


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 1, 3), nn.Linear(6, 1)], ids=["conv", "linear"])
def test_one_channel_is_kept(layer: nn.Module) -> None:
    layer = layer.double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = oracle_gradients(layer, x, 0.0, everywhere, loss)
    x.requires_grad_()
    layer.zero_grad()
    loss(make(layer, 0.9)(x)).backward()
    assert relative_error(gradients(layer, x), expected) < 1e-10


@pytest.mark.parametrize(("select", "score"), EVERY)
def test_all_channels_kept_are_the_dense_gradients(select: str, score: str) -> None:
    model = small_net(16).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.0, everywhere, loss)
    config = SparsityConfig(channel_multiple=16, min_channels=1, select=select, score=score)
    # Rounds up to all sixteen.
    scheduler = SparsityScheduler(constant(0.1))
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    assert scheduler.keep_counts.tolist() == [16, 16]
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10


@pytest.mark.parametrize(("select", "score"), EVERY)
def test_empty_batches_have_gradients_of_zero(select: str, score: str) -> None:
    selection = Selection(score=SCORES[score], select=SELECTORS[select])
    grad, x, weight = torch.randn(0, 16), torch.randn(0, 5), torch.randn(16, 5)
    found = sparse_linear_backward(grad, x, weight, 4, (True, True, True), selection)
    assert found[0].shape == (0, 5)
    assert not any(g.any() for g in found[1:])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_model_takes_an_empty_batch(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 8))
    compiled = make(model, backend=backend)
    for batch in (2, 0, 3):
        model.zero_grad()
        compiled(torch.randn(batch, 3, 6, 6)).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        assert len(rows(model[0].weight)) == (8 if batch else 0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("select", SELECTORS)
def test_deterministic_algorithms(select: str, backend: str) -> None:
    model = small_net(16)
    compiled = make(model, select=select, backend=backend)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    seen = []
    for _ in range(2):
        torch.manual_seed(3)
        model.zero_grad()
        x.grad = None
        loss(compiled(x)).backward()
        seen.append(gradients(model, x))
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert len(rows(model[0].weight)) == 8


def check(model: nn.Module, compiled: SsPropModule, x: Tensor, expected: dict[str, Tensor]) -> None:
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10


def exact_net() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    model = small_net(16).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    return model, x, oracle_gradients(model, x, 0.5, everywhere, loss)


def test_anomaly_mode() -> None:
    model, x, expected = exact_net()
    compiled = make(model)
    with torch.autograd.detect_anomaly(check_nan=True):
        check(model, compiled, x, expected)
        with pytest.raises(RuntimeError, match="returned nan values"):
            (compiled(x.detach()) * math.nan).sum().backward()


def test_hooks_on_the_model_and_on_its_parameters() -> None:
    model, x, expected = exact_net()
    compiled = make(model)
    seen: dict[str, Tensor] = {}
    model[3].weight.register_hook(lambda grad: seen.__setitem__("hook", grad.clone()))
    model[0].weight.register_post_accumulate_grad_hook(
        lambda p: seen.__setitem__("accumulated", p.grad.clone())
    )
    compiled.register_full_backward_hook(
        lambda module, grad_input, grad_output: seen.__setitem__("input", grad_input[0].clone())
    )
    check(model, compiled, x, expected)
    actual = {"3.weight": seen["hook"], "0.weight": seen["accumulated"], "inputs": seen["input"]}
    assert relative_error(actual, {name: expected[name] for name in actual}) < 1e-10


def test_a_hook_on_a_tensor_between_two_sites() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.net[0](x)
            x.register_hook(lambda grad: grad * 2)
            return self.net[3](self.net[2](self.net[1](x)))

    model = Hooked().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.5, everywhere, loss)
    check(model, make(model), x, expected)


def test_a_backward_hook_on_a_layer_is_eager_and_says_so() -> None:
    model, x, _ = exact_net()
    model[1].register_full_backward_hook(lambda module, grad_input, grad_output: None)
    with pytest.warns(NoEffectWarning, match="no sparse graph ran"):
        make(model)(x)


class Between(nn.Module):
    def __init__(self, is_broken: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.is_broken = is_broken

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.first(x).tanh()
        if self.is_broken:
            torch._dynamo.graph_break()
        return self.second(middle), middle


def test_gradients_of_tensors_between_two_graphs() -> None:
    model = Between(is_broken=True).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    output, middle = make(model)(x)
    found = torch.autograd.grad(loss(output), [middle, x, model.second.weight], retain_graph=True)
    expected = oracle_gradients(model.second, middle.detach(), 0.5, everywhere, loss)
    actual = {"inputs": found[0], "weight": found[2]}
    assert relative_error(actual, {name: expected[name] for name in actual}) < 1e-10
    (again,) = torch.autograd.grad(middle, x, found[0])
    torch.testing.assert_close(again, found[1])


def test_gradients_of_tensors_inside_a_graph_are_refused_as_by_torch_compile() -> None:
    for compiled in (make(Between(False)), torch.compile(Between(False), backend="aot_eager")):
        output, middle = compiled(torch.randn(2, 3, 8, 8))
        with pytest.raises(RuntimeError, match="appears to not have been used"):
            torch.autograd.grad(loss(output), middle)


def test_gradients_of_some_leaves_alone() -> None:
    model, x, expected = exact_net()
    compiled = make(model)
    (found,) = torch.autograd.grad(loss(compiled(x)), model[0].weight)
    assert relative_error({"0.weight": found}, {"0.weight": expected["0.weight"]}) < 1e-10
    assert all(p.grad is None for p in model.parameters())
