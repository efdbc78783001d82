"""slice_backward: what it does to the graph; end-to-end tests check the gradients."""

import copy

import pytest
import torch
from oracle import relative_error
from sample_oracle import kept_gradients, strongest
from ssprop_passes.kernels.operators import gather_weight
from ssprop_passes.transforms.sliced_backward import slice_backward
from torch import Tensor, fx, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.compiler import sliced_graph


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return nn.functional.max_pool2d(x, 3, 2, 1).flatten(1)


def test_a_gather_that_meets_a_pool_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor does not tile a kernel that reads two layouts, one of them by index."""
    graphs: list[fx.Graph] = []

    def record(gm: fx.GraphModule, *args: object) -> object:
        found = slice_backward(gm, *args)
        graphs.append(gm.graph)
        return found

    monkeypatch.setattr(sliced_graph, "slice_backward", record)
    torch.manual_seed(0)
    model = Stem().to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 16, 16).to(memory_format=torch.channels_last)
    want = kept_gradients(
        copy.deepcopy(model), (x,), lambda y: y.sin().sum(), lambda g: strongest(g, 3), 6
    )
    scheduler, config = SparsityScheduler(constant(0.5)), SparsityConfig(axis="sample")
    ssprop_compile(model, scheduler, config=config)(x).sin().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, want) < 1e-4
    (graph,) = graphs
    copies = graph.find_nodes(op="call_function", target=gather_weight)
    scatters = graph.find_nodes(op="call_function", target=torch.ops.aten.scatter_add.default)
    if not scatters:
        # torch 2.11 leaves the pool's backward one operator, which no gather joins.
        assert torch.__version__ < "2.14"
        return
    assert [node.meta["val"].shape[1:] for node in copies] == [(16, 16, 16)]
    gathers = graph.find_nodes(op="call_function", target=torch.ops.aten._unsafe_index.Tensor)
    assert gathers
