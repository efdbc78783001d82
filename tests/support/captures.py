"""The graphs that torch alone makes of a small model: Dynamo's, the joint one and its two parts."""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten


@dataclass
class Captured:
    """The graphs that torch makes of a step of a convolution and two linear layers."""

    model: nn.Module
    dynamo: fx.GraphModule
    inputs: list[Any]
    joint: fx.Graph
    forward: fx.Graph
    backward: fx.Graph

    def called(self, target: object, tag: str | None = None) -> list[fx.Node]:
        """Return the joint graph's nodes with this target and, if given, this partitioner tag."""
        nodes = self.joint.find_nodes(op="call_function", target=target)
        return [n for n in nodes if tag in (None, n.meta.get("partitioner_tag"))]


def capture(
    compile_graph: Callable[[fx.GraphModule, Sequence[Any]], Any], model: nn.Module | None = None
) -> nn.Module:
    """Compile `model`, by default a small one, with a backend, and run a step."""
    torch._dynamo.reset()
    model = model or nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 6), nn.Linear(6, 5)
    )
    x = torch.randn(2, 3, 5, 5)
    torch.compile(model, backend=compile_graph, fullgraph=True)(x).square().sum().backward()
    return model


def aot(
    gm: fx.GraphModule, inputs: Sequence[Any], note: Callable[[str, fx.GraphModule], None]
) -> Any:
    """Compile a Dynamo graph with AOTAutograd, without a hook for passes."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def compiler(kind: str) -> Callable[[fx.GraphModule, Any], Any]:
        def compile_part(part: fx.GraphModule, _inputs: Any) -> Any:
            note(kind, part)
            return make_boxed_func(part.forward)

        return compile_part

    # Inductor and the backend "aot_eager" partition this way, too.
    compile_graph = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    return compile_graph(gm, inputs)


@functools.cache
def captured() -> Captured:
    """Capture one step; nodes that take a weight have a mark in `meta["custom"]`."""
    from torch._functorch import config

    found: dict[str, Any] = {}

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        found["dynamo"], found["inputs"] = copy.copy(gm), list(inputs)
        weights = {
            node: node.name
            for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
            if isinstance(value, nn.Parameter) and value.ndim > 1
        }
        for node in gm.graph.nodes:
            for operand in node.all_input_nodes:
                if operand in weights:
                    node.meta["custom"] = {"mark": weights[operand]}
        return aot(gm, inputs, lambda kind, part: found.update({kind: part.graph}))

    def joint_pass(joint: fx.GraphModule, _inputs: Any) -> fx.GraphModule:
        found["joint"] = copy.deepcopy(joint.graph)
        return joint

    with config.patch(joint_custom_pass=joint_pass):
        model = capture(compile_graph)
    return Captured(model, **found)
