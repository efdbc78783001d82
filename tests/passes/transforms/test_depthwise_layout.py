"""DepthwiseLayoutPass: what it rewrites, its gradients, and the layout that ATen gets."""

import copy
from typing import Any

import pytest
import torch
from ssprop_passes.transforms.depthwise_layout import DepthwiseLayoutPass
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.compiler.inductor import compile_aot_eager

LAYERS: dict[str, Any] = {
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "stride": lambda: nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False),
    "multiplier": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8),
    "one input channel": lambda: nn.Conv2d(1, 8, 3, padding=1),
    "full": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, groups=8),
}
REWRITTEN = ("depthwise", "stride", "multiplier", "one input channel")


def network(kind: str) -> tuple[nn.Module, Tensor]:
    sources = 1 if kind == "one input channel" else 8
    stem = nn.Sequential(nn.Conv2d(3, sources, 1), nn.ReLU())
    model = nn.Sequential(stem, LAYERS[kind](), nn.Tanh()).double()
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    layout = torch.channels_last
    return model.to(memory_format=layout), x.contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "aot_eager") for kind in LAYERS), ("depthwise", "inductor"), ("stride", "inductor")],
)
def test_gradients_are_those_of_the_dense_backward(kind: str, backend: str) -> None:
    model, x = network(kind)
    want = copy.deepcopy(model)
    want(x).sum().backward()
    graph_pass = DepthwiseLayoutPass()
    settings: dict[str, Any] = {"options": {"joint_custom_pre_pass": graph_pass}}
    if backend == "aot_eager":
        settings = {"backend": lambda gm, args: compile_aot_eager(gm, args, graph_pass, {})}
    torch.compile(model, **settings)(x).sum().backward()
    assert graph_pass.summary.rewritten == (kind in REWRITTEN)
    for one, other in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_contiguous_images_stay() -> None:
    model, x = network("depthwise")
    graph_pass = DepthwiseLayoutPass()
    compiled = torch.compile(
        model.to(memory_format=torch.contiguous_format),
        backend=lambda gm, args: compile_aot_eager(gm, args, graph_pass, {}),
    )
    compiled(x.contiguous()).sum().backward()
    assert graph_pass.summary.rewritten == 0


def test_a_sliced_backward_gets_channels_last() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None):
            if op in (torch.ops.ssprop.conv_backward.default, *REFERENCE):
                seen.append(args[:2])
            return op(*args, **(kwargs or {}))

    model, x = network("depthwise")
    config, scheduler = SparsityConfig(axis="sample"), SparsityScheduler(constant(0.5))
    output = ssprop_compile(model, scheduler, config=config)(x)
    with Record():
        output.sum().backward()
    # The last layer comes first.
    for operand in seen[0]:
        assert operand.shape[0] == 2
        assert operand.is_contiguous(memory_format=torch.channels_last)


REFERENCE = (torch.ops.aten.convolution_backward.default,)
