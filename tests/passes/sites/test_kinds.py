"""Every kind of layer through ssprop_compile, compared with the oracle in float64."""

from collections.abc import Sequence

import pytest
import torch
from layers import EXACT, LAYERS, everywhere, loss
from oracle import gradients, oracle_gradients, relative_error
from torch import Tensor, nn
from torch.nn import functional

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile

# The kinds whose sparse backwards differ most; Inductor takes long for all kinds.
FEW = ("depthwise, multiplied", "transposed, grouped", "linear, permuted, twice")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_the_oracle(name: str, memory_format: torch.memory_format) -> None:
    make, shape = LAYERS[name]
    if memory_format is torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is a layout of four dimensions")
    # The layer lies between two pointwise functions, so that grad_output and input are computed.
    model = nn.Sequential(nn.Tanh(), make(), nn.Tanh()).double()
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format)
    expected = oracle_gradients(model, x, 0.7, everywhere, loss)
    scheduler = SparsityScheduler(constant(0.7))
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend="aot_eager")
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    assert {site.reason for site in report(compiled).sites} == {""}
    assert report(compiled).saved_flops >= 0.5 * report(compiled).backward_flops


class Zoo(nn.Module):
    """Several layers, for a single compile."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        self.layers = nn.ModuleList([LAYERS[name][0]() for name in names])

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for name, layer in zip(self.names, self.layers, strict=True):
            shape = LAYERS[name][1]
            data = x[: torch.Size(shape).numel()].view(shape)
            total = total + functional.silu(layer(data.tanh())).square().sum()
        return total


@pytest.mark.parametrize("names", [FEW, pytest.param(tuple(LAYERS), marks=pytest.mark.slow)])
def test_gradients_equal_the_oracle_under_inductor(names: tuple[str, ...]) -> None:
    model = Zoo(names).double()
    x = torch.randn(1000, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.7, everywhere, loss)
    compiled = ssprop_compile(model, SparsityScheduler(constant(0.7)), config=EXACT)
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    assert len(report(compiled).sparse_sites) == len(names) + ("linear, permuted, twice" in names)
    assert {site.reason for site in report(compiled).sites} == {""}


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 12), lambda: nn.Conv1d(6, 12, 1)])
def test_only_the_wanted_gradients(make: type[nn.Module], frozen: str) -> None:
    layer = make().double()
    x = torch.randn(3, 6, 6, dtype=torch.float64)
    expected = oracle_gradients(layer, x, 0.5, everywhere, loss)
    if frozen == "input":
        expected.pop("inputs")
    else:
        expected.pop(frozen)
        getattr(layer, frozen).requires_grad_(False)
        x.requires_grad_()
    compiled = ssprop_compile(
        layer, SparsityScheduler(constant(0.5)), config=EXACT, backend="aot_eager"
    )
    loss(compiled(x)).backward()
    assert relative_error(gradients(layer, x), expected) < 1e-10


def test_the_keep_count_of_a_grouped_convolution_is_that_of_a_group() -> None:
    layer = nn.Conv2d(8, 40, 3, groups=4)
    scheduler = SparsityScheduler(constant(0.75))
    compiled = ssprop_compile(layer, scheduler, config=EXACT, backend="aot_eager")
    loss(compiled(torch.randn(2, 8, 5, 5))).backward()
    assert scheduler.keep_counts.tolist() == [2]
    rows = (layer.weight.grad.flatten(1).abs().sum(1) > 0).view(4, 10).sum(1)
    assert rows.tolist() == [2, 2, 2, 2]
    assert report(compiled).sites[0].kept == 8


def test_products_of_activations_are_not_touched() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    for shape in ((5, 8), (2, 5, 8)):
        model = Attention().double()
        x = torch.randn(shape, dtype=torch.float64)
        expected = oracle_gradients(model, x, 0.5, everywhere, loss)
        compiled = ssprop_compile(
            model, SparsityScheduler(constant(0.5)), config=EXACT, backend="aot_eager"
        )
        x.requires_grad_()
        loss(compiled(x)).backward()
        assert relative_error(gradients(model, x), expected) < 1e-10
        assert [site.name for site in report(compiled).sparse_sites] == ["qkv"]


def test_targets_choose_the_kinds() -> None:
    for target, names in (("conv", {"0"}), ("depthwise", {"1"}), ("linear", {"3"})):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1, groups=8), nn.Flatten(), nn.Linear(8 * 9, 16)
        )
        config = SparsityConfig(channel_multiple=1, min_channels=1, targets=(target,))
        scheduler = SparsityScheduler(constant(0.5))
        compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
        loss(compiled(torch.randn(2, 3, 5, 5))).backward()
        assert {site.name for site in report(compiled).sparse_sites} == names
        dense = [site.reason for site in report(compiled).sites if site.reason]
        assert len(dense) == 2
        assert all("not among the targets" in reason for reason in dense)


def test_a_call_with_a_layers_weight_is_that_layers() -> None:
    class Borrowing(nn.Module):
        """Passes the weight of a layer to a functional call, as BEiT and EVA do."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)
            self.bias = nn.Parameter(torch.randn(24))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, weight=self.qkv.weight, bias=self.bias)

    model = Borrowing().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.5, everywhere, loss)
    compiled = ssprop_compile(
        model, SparsityScheduler(constant(0.5)), config=EXACT, backend="aot_eager"
    )
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    assert [site.name for site in report(compiled).sparse_sites] == ["qkv"]


def test_gradients_have_the_layout_that_following_views_need() -> None:
    class Tokens(nn.Module):
        """Has a depthwise convolution between two views of a token sequence, as PVT v2 does."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = self.dw(x.transpose(1, 2).view(2, 8, 3, 4))
            return x.flatten(2).transpose(1, 2)

    model = Tokens().double()
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.5, everywhere, loss)
    compiled = ssprop_compile(
        model, SparsityScheduler(constant(0.5)), config=EXACT, backend="aot_eager"
    )
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
