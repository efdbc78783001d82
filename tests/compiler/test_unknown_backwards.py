"""A layer that is captured but whose backward no kind of site knows is named."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from layers import EXACT, loss
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from ssprop_fx import SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.runtime.module import SsPropModule

COMPLEX = "its numbers are complex, and only real layers take part"
UNKNOWN = "its backward has a form that no kind of site knows"


def sparse(model: nn.Module) -> SsPropModule:
    return ssprop_compile(
        model, SparsityScheduler(constant(0.5)), config=EXACT, backend="aot_eager"
    )


def dense_sites(model: SsPropModule) -> dict[str, str]:
    return {site.name: site.reason for site in report(model).sites if site.reason}


class Complex(nn.Module):
    """A real layer, and a complex one behind it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.real = nn.Conv1d(2, 8, 1)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.real(x)
        y = torch.complex(x, x.tanh())
        y = y.transpose(1, 2) if isinstance(self.layer, nn.Linear) else y
        return self.layer(y).abs()


class ToComplex(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.complex(weight, weight.tanh())


def parametrized() -> nn.Module:
    """Its own weights are real."""
    layer = nn.Conv1d(8, 12, 3, bias=False)
    register_parametrization(layer, "weight", ToComplex(), unsafe=True)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv1d(8, 12, 3, dtype=torch.complex64),
        lambda: nn.ConvTranspose1d(8, 12, 3, dtype=torch.complex64),
        lambda: nn.Linear(8, 12, dtype=torch.complex64),
        parametrized,
    ],
    ids=["conv", "transposed", "linear", "parametrized"],
)
def test_a_complex_layer_is_dense_and_named(make: Callable[[], nn.Module]) -> None:
    model = Complex(make())
    plain, x = copy.deepcopy(model), torch.randn(2, 2, 9)
    compiled = sparse(model)
    with pytest.warns(NoEffectWarning, match=r"1 layer is compiled but dense: layer \(its numbers"):
        loss(compiled(x)).backward()
    assert dense_sites(compiled) == {"layer": COMPLEX}
    loss(plain(x)).backward()
    for mine, dense in zip(model.layer.parameters(), plain.layer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, dense.grad)


class Borrowing(nn.Module):
    """Computes with the weight of a layer, without calling it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.layer = nn.Linear(6, 12)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "einsum":
            return (x[:, None, :] * self.layer.weight).sum(-1)
        return nn.functional.linear(x, self.layer.weight.tanh())


@pytest.mark.parametrize("how", ["einsum", "computed"])
def test_a_layer_without_a_site_is_named(how: str) -> None:
    compiled = sparse(Borrowing(how))
    with pytest.warns(NoEffectWarning, match=r"compiled but dense: layer \(its backward has"):
        loss(compiled(torch.randn(2, 6))).backward()
    assert dense_sites(compiled)["layer"] == UNKNOWN


def test_a_model_without_any_product_is_named() -> None:
    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 12)

        def forward(self, x: Tensor) -> Tensor:
            return (x[:, None, :] * self.layer.weight).sum(-1)

    compiled = sparse(Scaling())
    with pytest.warns(NoEffectWarning, match=r"no site .* made sparse.*: its backward has a form"):
        loss(compiled(torch.randn(2, 6))).backward()
    assert f"dense: {UNKNOWN}" in str(report(compiled))


def test_layers_without_a_backward_of_their_own_give_no_alarm() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias_only = nn.Linear(6, 8)
            self.bias_only.weight.requires_grad_(False)
            self.frozen = nn.Linear(6, 8).requires_grad_(False)
            self.detached = nn.Linear(6, 8)
            self.last = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bias_only(x) + self.frozen(x) + self.detached(x).detach()
            return self.last(x)

    model = Detached()
    compiled = sparse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(compiled(torch.randn(2, 6))).backward()
    assert [site.name for site in report(compiled).sites] == ["last"]
    assert model.bias_only.bias.grad.all()


def test_the_projections_of_multihead_attention_have_its_name() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.attention(x, x, x)[0]

    compiled = sparse(Attention())
    loss(compiled(torch.randn(2, 5, 8))).backward()
    reason = "the projections of nn.MultiheadAttention keep all channels"
    assert dense_sites(compiled) == {"attention": reason}
