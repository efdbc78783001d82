"""The benchmarks' module swap: its gradients against the oracle's."""

import copy
from collections.abc import Sequence

import pytest
import timm
import torch
from oracle import gradients, oracle_gradients, relative_error
from torch import Tensor, fx, nn

from benchmarks.dense_kernels import dense_kernels
from benchmarks.peers import TopKConv2d, is_swappable, swap_convs
from ssprop_fx.compiler.inductor import compile_aot_eager


class Net(nn.Module):
    """Every case of the swap, and layers that it must not change."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(16, 24, 3, stride=2, padding=2, dilation=2, bias=False),
            nn.BatchNorm2d(24),
            nn.Conv2d(24, 24, 3, groups=4),
            nn.Tanh(),
            nn.Conv2d(24, 10, (1, 3), stride=(2, 1)),
        )
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().sum()


def takes_part(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def swapped_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, TopKConv2d)]


@pytest.mark.parametrize("drop_rate", [0.5, 0.8])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_equal_the_oracle(
    drop_rate: float, backend: str | None, layout: torch.memory_format
) -> None:
    model = Net().double().to(memory_format=layout)
    x = torch.randn(3, 3, 14, 14, dtype=torch.float64).to(memory_format=layout)
    expected = oracle_gradients(model, x, drop_rate, takes_part, loss, "mean_abs")
    swapped = swap_convs(model, drop_rate)
    x.requires_grad_()
    loss((torch.compile(swapped, backend=backend) if backend else swapped)(x)).backward()
    assert relative_error(gradients(swapped, x), expected) < 1e-10


@pytest.mark.slow
def test_gradients_of_a_timm_model_under_inductor_equal_the_oracle() -> None:
    model = timm.create_model("test_resnet", num_classes=5).double().train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.6, lambda m, _: is_swappable(m), loss, "mean_abs")
    swapped = swap_convs(model, 0.6)
    x.requires_grad_()
    loss(torch.compile(swapped)(x)).backward()
    assert relative_error(gradients(swapped, x), expected) < 1e-10


def test_two_drop_rates_are_two_compiles() -> None:
    for drop_rate, kept in ((0.5, 8), (0.75, 4)):
        swapped = swap_convs(Net(), drop_rate)
        loss(torch.compile(swapped, backend="aot_eager")(torch.randn(2, 3, 14, 14))).backward()
        assert (swapped.body[0].weight.grad.flatten(1).abs().sum(1) > 0).sum() == kept


def test_the_model_stays_as_it_is() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    swapped = swap_convs(model, 0.5)
    assert swapped_names(swapped) == ["body.0", "body.2", "body.6"]
    assert swapped_names(model) == []
    assert all(torch.equal(swapped.state_dict()[name], value) for name, value in before.items())
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.add_(1)
    loss(swapped(torch.randn(2, 3, 14, 14))).backward()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast_applies() -> None:
    conv = swap_convs(nn.Conv2d(3, 16, 3), 0.75)
    with torch.autocast("cpu", torch.bfloat16):
        output = conv(torch.randn(2, 3, 8, 8))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    assert (conv.weight.grad.flatten(1).abs().sum(1) > 0).sum() == 4


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(4, 4, 3),
        nn.ConvTranspose2d(4, 4, 3),
    ],
)
def test_other_layers_are_not_swapped(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"ungrouped nn\.Conv2d"):
        swap_convs(nn.Sequential(module), 0.5)


def test_a_dense_step_with_our_kernels_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(2, 3, 14, 14, dtype=torch.float64, requires_grad=True)
    loss(model(x)).backward()
    expected = gradients(model, x)
    targets: list[object] = []

    def passes(graph: fx.Graph) -> None:
        dense_kernels()(graph)
        targets.extend(node.target for node in graph.nodes)

    def backend(gm: fx.GraphModule, inputs: Sequence[Tensor]):
        return compile_aot_eager(gm, inputs, passes, {})

    model.zero_grad()
    x.grad = None
    loss(torch.compile(model, backend=backend)(x)).backward()
    assert targets.count(torch.ops.ssprop.conv_backward.default) == 4
    assert torch.ops.aten.convolution_backward.default not in targets
    assert relative_error(gradients(model, x), expected) < 1e-12
