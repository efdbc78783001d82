"""PatchPass: what it rewrites, what it leaves, and the gradients of the oracle."""

import copy
from typing import Any

import pytest
import torch
from patch_oracle import PatchOracle
from ssprop_passes.transforms.patches import PatchPass
from torch import Tensor, nn

from ssprop_fx.compiler.inductor import compile_aot_eager


class Net(nn.Module):
    """Two 1x1 convolutions that take patches, and one of each kind that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 12, 1)
        self.second = nn.Conv2d(12, 8, 1, bias=False)
        self.left = nn.ModuleList(
            [
                nn.Conv2d(8, 8, 1, groups=2),
                nn.ConvTranspose2d(8, 8, 1),
                nn.Conv2d(8, 8, 1, padding=1),
                nn.Conv2d(8, 8, 1, stride=2),
            ]
        )
        self.excite = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.relu(self.first(torch.relu(self.stem(x))))))
        for layer in self.left:
            x = torch.tanh(layer(x))
        return x * torch.sigmoid(self.excite(x.mean((2, 3), keepdim=True)))


def oracle(model: Net) -> Net:
    model = copy.deepcopy(model)
    model.first.__class__ = model.second.__class__ = PatchOracle
    return model


LAST = torch.channels_last


@pytest.mark.parametrize(
    ("size", "backend", "layout"),
    [
        (8, "aot_eager", LAST),
        (7, "aot_eager", LAST),
        (7, "aot_eager", torch.contiguous_format),
        (7, "inductor", LAST),
    ],
)
def test_gradients_equal_the_oracle(size: int, backend: str, layout: torch.memory_format) -> None:
    model: Any = Net().double().to(memory_format=layout)
    x = torch.randn(2, 3, size, size, dtype=torch.float64).contiguous(memory_format=layout)
    want, inputs = oracle(model), [x.clone().requires_grad_(), x.clone().requires_grad_()]
    want(inputs[0]).sin().sum().backward()
    graph_pass = PatchPass(2)
    settings: dict[str, Any] = {"options": {"joint_custom_pre_pass": graph_pass}}
    if backend == "aot_eager":
        settings = {"backend": lambda gm, args: compile_aot_eager(gm, args, graph_pass, {})}
    torch.compile(model, **settings)(inputs[1]).sin().sum().backward()
    assert (graph_pass.summary.matched, graph_pass.summary.rewritten) == (8, 2)
    assert sorted(graph_pass.summary.left.values()) == [1, 5]
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for (name, one), other in zip(model.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_the_saved_flops_are_those_of_the_smaller_products() -> None:
    model, graph_pass = Net(), PatchPass(2)
    compiled = torch.compile(
        model, backend=lambda gm, args: compile_aot_eager(gm, args, graph_pass, {})
    )
    compiled(torch.randn(2, 3, 8, 8)).sum().backward()
    # Two layers of 12 x 8 weights, two products each, of 128 positions.
    assert graph_pass.saved_flops == 2 * 2 * (2 * 128 * 96) * 3 // 4
