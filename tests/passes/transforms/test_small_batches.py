"""keep_onednn: which convolutions it changes, that results stay, and that oneDNN computes them."""

from typing import Any

import pytest
import torch
from ssprop_passes.transforms.small_batches import keep_onednn
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

# A torch without it, as on macOS, has nothing to keep.
HAS_ONEDNN = torch.backends.mkldnn.is_available()

KINDS: dict[str, Any] = {
    "1x1": lambda: nn.Conv2d(8, 4, 1),
    "1x1 without bias": lambda: nn.Conv2d(8, 4, 1, bias=False),
    "3x3": lambda: nn.Conv2d(8, 4, 3, padding=1),
    "stride": lambda: nn.Conv2d(8, 4, 1, stride=2),
    "padding": lambda: nn.Conv2d(8, 4, 1, padding=1),
    "groups": lambda: nn.Conv2d(8, 4, 1, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 4, 1),
    "float64": lambda: nn.Conv2d(8, 4, 1).double(),
    "1-D": lambda: nn.Conv1d(8, 4, 1),
}


def traced(layer: nn.Module, x: Tensor) -> tuple[Any, list[Tensor]]:
    """Return a graph of the gradients of input and parameters, and its inputs."""
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def gradients(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in (x, *parameters)]
        given = dict(zip(names, leaves[1:], strict=True))
        output = torch.func.functional_call(layer, given, (leaves[0],))
        return list(torch.autograd.grad(output.sin().sum(), leaves))

    inputs = [x, *(parameter.detach() for parameter in parameters)]
    return make_fx(gradients, tracing_mode="fake")(*inputs), inputs


def image(side: int, kind: str) -> Tensor:
    shape = (3, 8, side * side) if kind == "1-D" else (3, 8, side, side)
    return torch.randn(shape, dtype=torch.float64 if kind == "float64" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_only_plain_1x1_convolutions_change_and_results_stay(kind: str) -> None:
    graph_module, inputs = traced(KINDS[kind](), image(12, kind))
    want = graph_module(*inputs)
    # The forward, and the backward.
    changes = HAS_ONEDNN and kind.startswith("1x1")
    assert keep_onednn(graph_module.graph) == (2 if changes else 0)
    graph_module.recompile()
    for one, other in zip(graph_module(*inputs), want, strict=True):
        torch.testing.assert_close(one, other)


def test_small_images_stay() -> None:
    assert keep_onednn(traced(KINDS["1x1"](), image(9, "1x1"))[0].graph) == 0


def test_onednn_computes_them_on_one_thread() -> None:
    graph_module, inputs = traced(KINDS["1x1"](), image(12, "1x1"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seen = []
        for changes in (False, True):
            if changes:
                keep_onednn(graph_module.graph)
                graph_module.recompile()
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                graph_module(*inputs)
            seen.append({event.key for event in recorded.key_averages()})
    finally:
        torch.set_num_threads(threads)
    own = "aten::_slow_conv2d_backward"
    assert own in seen[0]
    assert (own in seen[1]) != HAS_ONEDNN
    assert ("aten::mkldnn_convolution" in seen[1]) == HAS_ONEDNN
