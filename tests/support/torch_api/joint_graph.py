"""The joint graph."""

from collections.abc import Sequence
from typing import Any

import torch
from captures import aot, capture, captured
from torch import Tensor, fx, nn

from torch_api.canary import find, relies_on

aten = torch.ops.aten


@relies_on("torch._functorch.config.patch")
def the_joint_graph_can_be_replaced() -> None:
    """`torch._functorch.config.joint_custom_pass` is a function of the joint graph module and its
    inputs. It sees forward and backward in one graph, and AOTAutograd partitions what it returns.
    The call comes before a backend returns.
    """
    graph = captured().joint
    names = [str(n.target) for n in graph.find_nodes(op="placeholder")]
    assert sum(name.startswith("primals") for name in names) == len(captured().inputs)
    assert sum("tangents" in name for name in names) == 1
    assert captured().called(aten.convolution.default)
    assert captured().called(aten.convolution_backward.default)


@relies_on("meta.val", ".fake_mode", ".hint")
def nodes_of_the_joint_graph_carry_fake_values() -> None:
    """`meta["val"]` of each node is a fake tensor with its `fake_mode`, or a tuple of fake tensors.
    `size.node.hint` is the value of a symbolic size in this compilation.
    """
    (node,) = captured().called(aten.convolution_backward.default)
    assert node.meta["val"][1].shape == (4, 3, 3, 3)
    assert node.args[0].meta["val"].fake_mode is node.args[1].meta["val"].fake_mode
    hints: list[int] = []

    def compile_graph(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Any:
        values = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        hints.extend(s.node.hint for v in values if isinstance(v, Tensor) for s in v.shape)
        return gm.forward

    torch.compile(torch.relu, backend=compile_graph, dynamic=True)(torch.ones(7, 5))
    assert hints == [7, 5]


@relies_on("meta.custom")
def custom_metadata_reaches_the_backward() -> None:
    """A backend may write an entry into `meta["custom"]` of a node of Dynamo's graph. In the joint
    graph, the nodes of that call and of its backward carry the entry, and no other products do.
    """
    graph = captured()
    (convolution,) = graph.called(aten.convolution.default)
    (backward,) = graph.called(aten.convolution_backward.default)
    assert backward.meta["custom"] == convolution.meta["custom"]
    products = [*graph.called(aten.addmm.default), *graph.called(aten.mm.default)]
    marks = [n.meta["custom"]["mark"] for n in products]
    assert sorted(map(marks.count, set(marks))) == [3, 3]
    assert backward.meta["custom"]["mark"] not in marks


@relies_on("meta.seq_nr")
def a_linear_call_and_its_backward_share_a_number() -> None:
    """The forward product of a linear call and its two backward products carry the same
    `meta["seq_nr"]`. Another call has another number.
    """
    graph = captured()
    numbers = [n.meta["seq_nr"] for n in graph.called(aten.addmm.default)]
    assert len(set(numbers)) == 2
    backward = [n.meta["seq_nr"] for n in graph.called(aten.mm.default)]
    assert sorted(backward) == sorted(numbers * 2)


@relies_on("meta.partitioner_tag")
def nodes_are_tagged_as_forward_or_backward() -> None:
    """`meta["partitioner_tag"]` is "is_forward" or "is_backward" on the nodes of the joint graph.
    A node tagged "is_backward" may still move to the forward; "must_be_in_backward" prevents that.
    """
    from torch._functorch import config

    graph = captured()
    assert graph.called(aten.addmm.default, "is_forward") == graph.called(aten.addmm.default)
    assert graph.called(aten.mm.default, "is_backward") == graph.called(aten.mm.default)

    def part_of_node_tagged(tag: str) -> list[str]:
        """Return the part that computes a small number from a large tensor of the forward."""
        parts: list[str] = []

        def add_sum(joint: fx.GraphModule, _inputs: Any) -> fx.GraphModule:
            (forward,) = find(joint.graph, aten.convolution.default)
            (backward,) = find(joint.graph, aten.convolution_backward.default)
            fake = forward.meta["val"]
            with joint.graph.inserting_before(backward):
                total = joint.graph.call_function(aten.sum.default, (forward,))
                shifted = joint.graph.call_function(aten.sub.Tensor, (backward.args[0], total))
            with fake.fake_mode:
                total.meta.update(val=fake.sum(), partitioner_tag=tag)
                shifted.meta.update(val=torch.empty_like(fake), partitioner_tag="is_backward")
            backward.args = (shifted, *backward.args[1:])
            joint.recompile()
            return joint

        def note(kind: str, part: fx.GraphModule) -> None:
            parts.extend([kind] * len(find(part.graph, aten.sum.default)))

        with config.patch(joint_custom_pass=add_sum):
            capture(lambda gm, inputs: aot(gm, inputs, note))
        return parts

    assert part_of_node_tagged("is_backward") == ["forward"]
    assert part_of_node_tagged("must_be_in_backward") == ["backward"]


@relies_on("aten.convolution_backward")
def the_backward_of_a_convolution_is_one_operator() -> None:
    """Its arguments are, in this order: grad_output, input, weight, bias sizes, stride, padding,
    dilation, transposed, output padding, groups, output mask. It returns a tuple of three.
    """
    names = " ".join(
        argument.name for argument in aten.convolution_backward.default._schema.arguments
    )
    assert names == (
        "grad_output input weight bias_sizes stride padding dilation transposed output_padding"
        " groups output_mask"
    )
    (node,) = captured().called(aten.convolution_backward.default)
    assert len(node.args) == 11
    assert node.args[-1] == [False, True, True]


@relies_on("._unsafe_view")
def views_of_products_are_this_operator() -> None:
    """A linear call on more than two dimensions is a product and a view of it. The view is
    `aten.view` or `aten._unsafe_view`.
    """
    seen: set[object] = set()
    model = nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(0, (2, 3)), nn.Linear(5, 5, bias=False))
    capture(
        lambda gm, x: aot(gm, x, lambda _, part: seen.update(n.target for n in part.graph.nodes)),
        model,
    )
    assert aten.mm.default in seen
    assert seen & {aten.view.default, aten._unsafe_view.default}


@relies_on("torch._ops.OpOverload", "._schema")
def operators_say_whether_they_write() -> None:
    """The target of a node that calls an operator is an `OpOverload`. Its `_schema.is_mutable`
    says whether the operator writes to an operand.
    """
    from torch._ops import OpOverload

    assert isinstance(captured().called(aten.addmm.default)[0].target, OpOverload)
    assert aten.copy_.default._schema.is_mutable
    assert not aten.add.Tensor._schema.is_mutable
