"""Every kind of layer through ssprop_compile, against the oracle in float64."""

from collections.abc import Sequence

import pytest
import torch
from oracle import gradients, oracle_gradients, relative_error
from torch import Tensor, nn
from torch.nn import functional

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.config import TARGETS

EXACT = SparsityConfig(channel_multiple=1, min_channels=1, targets=TARGETS)

# name -> layer, shape of its input
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(6, 12, 3, stride=2), (2, 6, 15)),
    "conv2d": (lambda: nn.Conv2d(3, 10, 3, dilation=2), (2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 10, 2, padding=1, bias=False), (2, 3, 4, 5, 6)),
    "conv2d, same": (lambda: nn.Conv2d(3, 10, (2, 4), padding="same"), (2, 3, 9, 9)),
    "grouped": (lambda: nn.Conv2d(8, 20, 3, groups=4), (2, 8, 7, 7)),
    "grouped, 1d": (lambda: nn.Conv1d(8, 20, 3, groups=2), (2, 8, 9)),
    "depthwise": (lambda: nn.Conv2d(10, 10, 3, padding=1, groups=10), (2, 10, 7, 7)),
    "depthwise, multiplied": (lambda: nn.Conv2d(5, 15, 3, stride=2, groups=5), (2, 5, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 10, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(6, 12, 2, groups=3), (2, 6, 5, 5)),
    "transposed, depthwise": (lambda: nn.ConvTranspose1d(6, 12, 2, groups=6), (2, 6, 5)),
    "linear": (lambda: nn.Linear(7, 12), (5, 7)),
    "linear, 3-D": (lambda: nn.Linear(7, 12), (2, 5, 7)),
    "linear, 4-D, no bias": (lambda: nn.Linear(7, 12, bias=False), (2, 3, 4, 7)),
    "one point": (lambda: nn.Conv2d(6, 12, 1), (3, 6, 1, 1)),
}


class Permuted(nn.Module):
    """A linear layer on an input whose last dimension is not contiguous, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)) + self.layer(x.transpose(1, 2).tanh())


class Mixed(nn.Module):
    """A linear layer over the second dimension, so that gradients reach it through a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2).contiguous()


LAYERS["linear, permuted, twice"] = (Permuted, (2, 6, 5))
LAYERS["linear, mixed"] = (Mixed, (2, 6, 5))

# Kinds that differ most in what their sparse backward does; Inductor takes long for all.
FEW = ("depthwise, multiplied", "transposed, grouped", "linear, permuted, twice")


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().sum()


def everywhere(module: nn.Module, name: str) -> bool:
    return True


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_the_oracle(name: str, memory_format: torch.memory_format) -> None:
    make, shape = LAYERS[name]
    if memory_format is torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is a layout of four dimensions")
    # Between two pointwise functions, so that grad_output and input are computed ones.
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
        """As BEiT and EVA do: the weight of a layer in a functional call."""

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
        """As PVT v2 does: a depthwise convolution between two views of a token sequence."""

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
