"""Export, tracing and transforms of torch.func get the model as it is, in a sparse phase too."""

import warnings
from collections.abc import Callable

import pytest
import torch
from layers import EXACT
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from ssprop_fx import SparsityScheduler, constant, ssprop_compile

X = torch.randn(4, 6)


def module(net: nn.Module) -> nn.Module:
    return ssprop_compile(net, SparsityScheduler(constant(0.5)), config=EXACT, backend="aot_eager")


def in_place(net: nn.Module) -> nn.Module:
    scheduler = SparsityScheduler(constant(0.5))
    ssprop_compile(net, scheduler, config=EXACT, backend="aot_eager", in_place=True)
    return net


class Around(nn.Module):
    """Holds a compiled model, for tracers that trace no `ssprop_compile` of the whole."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


TRACERS = {
    "export": lambda model: torch.export.export(model, (X,)).module(),
    "strict export": lambda model: torch.export.export(model, (X,), strict=True).module(),
    "make_fx": lambda model: make_fx(model)(X),
    "jit": lambda model: torch.jit.trace(model, (X,)),
    "fx": lambda model: torch.fx.symbolic_trace(Around(model)),
}
MAKES = pytest.mark.parametrize("make", [module, in_place])


@MAKES
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("tracer", TRACERS)
def test_what_is_traced_is_the_model(make: Callable[[nn.Module], nn.Module], tracer: str) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    with torch.no_grad():
        expected = net(X) + (tracer == "fx")
    traced = TRACERS[tracer](make(net))
    torch.testing.assert_close(traced(X), expected)


def test_fx_cannot_trace_the_returned_module_itself() -> None:
    with pytest.raises(RuntimeError, match=r"ssprop_compile returned: trace the model itself$"):
        torch.fx.symbolic_trace(module(nn.Linear(6, 8)))


def of_weights(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (x,)).square().sum()

    return grad(loss)(dict(model.named_parameters()))


TRANSFORMS = {
    "grad": of_weights,
    "vmap": lambda model, x: {"outputs": vmap(lambda row: model(row[None])[0])(x)},
    "jacrev": lambda model, x: {"jacobian": jacrev(model)(x)},
}


@MAKES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_is_exact_and_says_that_it_is_dense(
    make: Callable[[nn.Module], nn.Module], transform: str
) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
    expected = TRANSFORMS[transform](net, X)
    model = make(net)
    with pytest.warns(NoEffectWarning, match=r"inside a transform of torch\.func") as caught:
        found = TRANSFORMS[transform](model, X)
    assert caught[0].filename == __file__
    for name, value in expected.items():
        own = f"_orig_mod.{name}" if f"_orig_mod.{name}" in found else name
        torch.testing.assert_close(found[own], value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TRANSFORMS[transform](model, X)  # once is enough


def test_a_transform_in_evaluation_gives_no_alarm() -> None:
    model = module(nn.Linear(6, 8)).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        vmap(lambda row: model(row[None])[0])(X)
