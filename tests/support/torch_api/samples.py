"""What a backward of the kept samples relies on, as `torch_api` describes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from torch_api.canary import find, relies_on

aten = torch.ops.aten


@relies_on("._dynamo_propagated_dynamic_indices", "._dynamo_weak_dynamic_indices")
def a_marked_dimension_becomes_a_symbol_and_calls_need_no_mark() -> None:
    """Dynamo makes a size symbolic if the tensor has the dimension in one of these sets. Compiled
    code also serves tensors without the mark, and with other sizes.
    """
    from ssprop_fx.compiler.batch_input import MARK

    sizes: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        tensors = [p.meta["example_value"] for p in gm.graph.find_nodes(op="placeholder")]
        sizes.extend(value.shape[0] for value in tensors if isinstance(value, Tensor))
        return gm.forward

    compiled = torch.compile(lambda x: x.sin(), backend=backend)
    marked = torch.ones(6, 2)
    setattr(marked, MARK, {0})
    compiled(marked)
    delattr(marked, MARK)
    compiled(marked)
    compiled(torch.ones(9, 2))
    assert len(sizes) == 1
    assert isinstance(sizes[0], torch.SymInt)


@relies_on("meta.recompute", "meta.ac_graph_id")
def the_partitioner_saves_and_recomputes_what_it_is_told() -> None:
    """`MUST_SAVE` in `node.meta["recompute"]` makes a forward node an output of the forward,
    `MUST_RECOMPUTE` makes the backward compute it again. The backward's placeholders share the
    metadata of the nodes that are saved.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    for policy, is_saved in (
        (CheckpointPolicy.MUST_SAVE, True),
        (CheckpointPolicy.MUST_RECOMPUTE, False),
    ):
        names: list[str] = []

        def joint(graph: fx.Graph, policy: CheckpointPolicy = policy) -> None:
            (node,) = find(graph, aten.exp.default)
            node.meta.update(recompute=policy, ac_graph_id=0, canary="exp")

        def backward(
            gm: fx.GraphModule, _inputs: Any, names: list[str] = names
        ) -> Callable[..., Any]:
            placeholders = gm.graph.find_nodes(op="placeholder")
            names.extend(p.meta["canary"] for p in placeholders if "canary" in p.meta)
            return gm.forward

        run_with_backward(lambda x: x.exp().sin(), joint, backward)
        assert (names == ["exp"]) is is_saved


@relies_on("torch._dynamo.backends.debugging.boxed_nop")
def the_eager_backend_takes_a_compiler_for_the_backward() -> None:
    """`lookup_backend("aot_eager")` takes `bw_compiler`; `boxed_nop` returns a boxed callable."""
    from torch._dynamo.backends.debugging import boxed_nop

    seen: list[int] = []

    def backward(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compiled = boxed_nop(gm, inputs)

        def run(args: list[Any]) -> Any:
            seen.append(len(args))
            return compiled(args)

        run._boxed_call = True
        return run

    run_with_backward(lambda x: x.sin(), lambda graph: None, backward)
    assert seen


def run_with_backward(
    fn: Callable[[Tensor], Tensor],
    joint: Callable[[fx.Graph], None],
    backward: Callable[..., Callable[..., Any]],
) -> None:
    """Run a function forward and backward, with these on the joint graph and for the backward."""
    from torch._dynamo.backends.registry import lookup_backend

    compiler: Any = lookup_backend("aot_eager")

    def joint_pass(gm: fx.GraphModule, _inputs: Any) -> fx.GraphModule:
        joint(gm.graph)
        return gm

    patches = {"joint_custom_pass": joint_pass, "enable_autograd_cache": False}
    with torch._functorch.config.patch(patches):
        compiled = torch.compile(
            fn, backend=lambda gm, inputs: compiler(gm, inputs, bw_compiler=backward)
        )
        compiled(torch.ones(3, requires_grad=True)).sum().backward()


@relies_on(
    "torch._dynamo.source.ConstantSource",
    "torch.fx.experimental.symbolic_shapes.DimDynamic",
)
def a_new_symbol_differs_from_one_of_the_same_size() -> None:
    """`create_symbol` with `DimDynamic.DYNAMIC` and a source of its own makes a new symbol, whose
    `create_symintnode` has the size as its hint. `suppress_guards` adds no guard.
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    shapes = ShapeEnv()
    first, second = (
        shapes.create_symbol(6, ConstantSource(name), DimDynamic.DYNAMIC, constraint_dim=None)
        for name in ("first", "second")
    )
    assert first != second
    size = shapes.create_symintnode(first, hint=None)
    assert size.node.hint == 6
    with shapes.suppress_guards():
        assert size < 10
    assert not shapes.guards


@relies_on("._softmax", "._log_softmax", "._unsafe_index", "._unsafe_index_put")
def operators_that_may_mix_samples_have_these_names() -> None:
    """These are operators of ATen; dimension and indices are the second argument."""
    for packet in (aten._softmax, aten._log_softmax):
        assert packet.default._schema.arguments[1].name == "dim"
    for packet in (aten._unsafe_index.Tensor, aten._unsafe_index_put.default):
        assert packet._schema.arguments[1].name == "indices"
