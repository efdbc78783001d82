"""Small joint graphs for the tests of the passes."""

from collections.abc import Callable

import torch
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.site import SITE_KEY, Slot
from ssprop_passes.transforms.sparse_backward import SparseBackwardPass
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func

from ssprop_fx.compiler.backend import SparseBackend


def joint_graph(
    fn: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    slot_count: int,
    change: Callable[[fx.Graph], None],
) -> tuple[fx.Graph, tuple[torch.Tensor | None, ...]]:
    """Trace `fn(*inputs)`, let `change` edit the joint graph, and run it.

    Returns:
        The joint graph after the edit, and the inputs' gradients of the sum of squares.
    """
    torch._dynamo.reset()
    graphs = []

    def joint_pass(joint: fx.GraphModule, _inputs: object) -> fx.GraphModule:
        change(joint.graph)
        joint.graph.lint()
        joint.recompile()
        graphs.append(joint.graph)
        return joint

    backend = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward))
    keep_counts = torch.full((slot_count,), 2)
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]

    def capture(gm: fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., object]:
        from ssprop_fx.compiler.dynamo_graph import with_extra_inputs

        for node in gm.graph.nodes:
            if node.op == "call_function":
                node.meta["custom"] = {SITE_KEY: "layer"}
        gm = with_extra_inputs(gm, [keep_counts])
        compiled = backend(gm, [*example_inputs, keep_counts])
        return lambda *args: compiled(*args, keep_counts)

    with functorch_config.patch(joint_custom_pass=joint_pass):
        torch.compile(fn, backend=capture, fullgraph=True)(*leaves).square().sum().backward()
    (graph,) = graphs
    return graph, tuple(leaf.grad for leaf in leaves)


def sparse_pass(
    channels: int, groups: int = 1, excluded: str = "", **selection: object
) -> SparseBackwardPass:
    slot = Slot(0, "layer", channels, groups)
    return SparseBackwardPass(
        slots={} if excluded else {"layer": slot},
        excluded={"layer": excluded} if excluded else {},
        layers=("layer",),
        slot_count=1,
        decompositions=dict,
        selection=Selection(**selection),
    )


def count(graph: fx.Graph, target: object) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


def sparse_runs(backend: SparseBackend) -> int:
    """Return how often a backend called its graphs that have a rewritten site."""
    return sum(graph.runs for graph in backend.graphs if graph.is_sparse)


def small_net(channels: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride=2, bias=False),
    )
