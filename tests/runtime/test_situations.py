"""Situations that people meet: right gradients, no silence, and no false alarm."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from graphs import sparse_runs
from no_edit import compiled, loss, variant
from oracle import oracle_gradients, relative_error
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.runtime.module import SsPropModule

EXACT = SparsityConfig(channel_multiple=1, min_channels=1)


def sparse(model: nn.Module, rate: float = 0.5, **kwargs: object) -> SsPropModule:
    kwargs = {"config": EXACT, "backend": "aot_eager", **kwargs}
    return ssprop_compile(model, SparsityScheduler(constant(rate)), **kwargs)


class Counted(nn.Module):
    """A parametrization that notes how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, weight: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.runs += 1
        return 2 * weight


def test_a_parametrized_weight_is_never_read() -> None:
    layer = nn.Conv2d(3, 32, 3)
    counted = Counted()
    register_parametrization(layer, "weight", counted)
    counted.runs = 0
    model = sparse(nn.Sequential(layer, nn.ReLU()))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert counted.runs == 0
    assert [site.kept for site in report(model).sites] == [16]


def test_spectral_norm_takes_the_steps_that_the_plain_model_takes() -> None:
    plain = nn.Sequential(spectral_norm(nn.Conv2d(3, 32, 3)), spectral_norm(nn.Conv2d(32, 8, 3)))
    model = copy.deepcopy(plain)
    x = torch.randn(2, 3, 8, 8)
    ours, reference = sparse(model, rate=0.0), torch.compile(plain, backend="aot_eager")
    for _ in range(3):
        assert torch.equal(ours(x), reference(x))


class Tied(nn.Module):
    """Two layers of one weight, and a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.a = nn.Linear(32, 32)
        self.b = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.b.weight = self.a.weight
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.embedding(tokens)).tanh()).tanh())


def test_tied_layers_are_sparse_without_an_alarm() -> None:
    model = sparse(Tied())
    tokens = torch.randint(40, (4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens).square().sum().backward()
    kept = {site.name: site.kept for site in report(model).sites if not site.reason}
    assert kept == {"head": 20, "a": 16}
    reason = "it shares the weight of 'a', and counts under that name"
    assert model.ssprop.table.excluded["b"] == reason


def test_a_rate_for_a_layer_without_a_weight_of_its_own_is_refused() -> None:
    config = SparsityConfig(min_channels=1, rates={"b": 0.5})
    with pytest.raises(ValueError, match=r"'b', which matches only layers that share .* 'a'"):
        sparse(Tied(), config=config)


def test_a_network_that_is_frozen_for_a_while_gives_no_alarm() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU())
    model = sparse(net)
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            net.requires_grad_(False)
            assert not model(x).requires_grad
            net.requires_grad_(True)
            model(x).square().sum().backward()
    assert sparse_runs(model.ssprop.backend) == 2


def test_a_model_that_is_compiled_already_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3))
    net.compile(backend="aot_eager")
    for in_place in (False, True):
        with pytest.raises(ValueError, match=r"^model must not be compiled already"):
            sparse(net, in_place=in_place)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_in_place_again_it_follows_the_new_scheduler(in_place: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3))
    x = torch.randn(2, 3, 8, 8)
    sparse(net, rate=0.75, in_place=True)
    net(x).square().sum().backward()
    assert int(net[0].weight.grad.flatten(1).any(1).sum()) == 8
    net.zero_grad()
    again = sparse(net, rate=0.25, in_place=in_place)
    (net if in_place else again)(x).square().sum().backward()
    assert int(net[0].weight.grad.flatten(1).any(1).sum()) == 24


def named(model: nn.Module, rate: float) -> nn.Module:
    return compiled(model, f"constant:rate={rate}")


def in_place(model: nn.Module, rate: float) -> nn.Module:
    sparse(model, rate, in_place=True)
    return model


@pytest.mark.parametrize("make", [sparse, in_place, named])
def test_training_in_eval_mode_says_that_it_is_dense(make: Callable[..., nn.Module]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)).eval()
    x = torch.randn(2, 3, 8, 8)
    model = make(net, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(x).square().sum().backward()
    (warning,) = caught
    assert warning.category is NoEffectWarning
    assert str(warning.message).startswith(
        "the model is in eval() mode, so this backward was dense"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize("make", [sparse, in_place, named])
def test_evaluation_in_a_dense_phase_gives_no_alarm(make: Callable[..., nn.Module]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3)).eval()
    model = make(net, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()


def test_only_batch_norms_in_eval_mode_train_sparse() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32))
    model = sparse(net)
    net[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert int(net[0].weight.grad.flatten(1).any(1).sum()) == 16


def test_an_input_gradient_inside_of_dense_is_exact() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU()).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(loss(net(x)), x)
    model = sparse(net, rate=0.8)
    scheduler = model.ssprop.scheduler
    with scheduler.dense():
        (inside,) = torch.autograd.grad(loss(model(x)), x)
    (after,) = torch.autograd.grad(loss(model(x)), x)
    assert relative_error({"x": inside}, {"x": expected}) < 1e-12
    assert relative_error({"x": after}, {"x": expected}) > 0.1
    with pytest.raises(RuntimeError, match="stop"), scheduler.dense():
        raise RuntimeError("stop")
    assert scheduler.drop_rate == 0.8


def test_functional_call_under_the_named_backend_is_sparse() -> None:
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = oracle_gradients(copy.deepcopy(net), x, 0.5, lambda module, name: True, loss)
    others = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    model = compiled(net, "constant:rate=0.5")
    prefixed = {f"_orig_mod.{name}": tensor for name, tensor in others.items()}
    loss(torch.func.functional_call(model, prefixed, (x,))).backward()
    assert sparse_runs(variant(net).backend) == 1
    found = {name: tensor.grad for name, tensor in others.items()}
    assert relative_error(found, {name: expected[name] for name in found}) < 1e-10
