"""SparseBackwardPass on small joint graphs: what it rewrites, what it leaves, what it writes."""

import logging

import pytest
import torch
from graphs import count, joint_graph, sparse_pass
from oracle import mask_channels
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.graph.graph_pass import PassList, is_joint_graph
from ssprop_passes.graph.rewrite import INSERTED_KEY
from ssprop_passes.kernels.operators import reduced_conv_backward
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.ranks import Ranks
from ssprop_passes.selection.scores import mean_abs
from ssprop_passes.selection.selectors import sampled
from ssprop_passes.sites.match import UNKNOWN
from ssprop_passes.sites.site import MIN_KEEP_COUNT, Slot
from ssprop_passes.transforms.two_step_sums import TwoStepSumsPass
from torch import fx
from torch.nn import functional

aten = torch.ops.aten
dense_backward = aten.convolution_backward.default

# name -> (shape of input, shape of weight, has bias, arguments of conv2d)
GEOMETRIES = {
    "plain": ((2, 3, 8, 8), (8, 3, 3, 3), False, {}),
    "bias": ((2, 3, 8, 8), (8, 3, 3, 3), True, {"padding": 1}),
    "strided": ((2, 3, 9, 8), (8, 3, 3, 3), True, {"stride": (2, 1), "padding": (1, 0)}),
    "dilated": ((2, 3, 9, 9), (8, 3, 3, 3), True, {"dilation": 2}),
    "pointwise": ((2, 5, 4, 4), (8, 5, 1, 1), False, {}),
    "one point": ((2, 5, 1, 1), (8, 5, 1, 1), True, {}),
    "even kernel": ((2, 3, 8, 8), (8, 3, 2, 4), True, {"padding": "same"}),
}


def tensors(name: str) -> tuple[list[torch.Tensor], dict]:
    input_shape, weight_shape, has_bias, kwargs = GEOMETRIES[name]
    shapes = [input_shape, weight_shape] + ([weight_shape[:1]] if has_bias else [])
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes], kwargs


def masked_gradients(inputs: list[torch.Tensor], kwargs: dict) -> list[torch.Tensor]:
    """Return dense gradients of the sum of squares with grad_output masked to 2 of 8 channels."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = functional.conv2d(*inputs, **kwargs)
    output.register_hook(lambda grad: mask_channels(grad, 0.75))
    output.square().sum().backward()
    return [x.grad for x in inputs]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_rewrites_to_the_masked_gradients(name: str, memory_format: torch.memory_format) -> None:
    inputs, kwargs = tensors(name)
    inputs[0] = inputs[0].detach().to(memory_format=memory_format).requires_grad_()
    sparse = sparse_pass(8)
    graph, grads = joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, sparse)
    assert count(graph, dense_backward) == 0
    assert count(graph, reduced_conv_backward) == 1
    assert count(graph, aten.topk.default) == 1
    assert count(graph, aten._local_scalar_dense.default) == 1
    assert [site.reason for site in sparse.sites] == [""]
    for grad, expected in zip(grads, masked_gradients(inputs, kwargs), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_computes_only_the_wanted_gradients(frozen: int) -> None:
    inputs, kwargs = tensors("bias")
    expected = masked_gradients(inputs, kwargs)
    inputs[frozen].requires_grad_(False)
    graph, grads = joint_graph(
        lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, sparse_pass(8)
    )
    (node,) = graph.find_nodes(op="call_function", target=reduced_conv_backward)
    assert node.args[-2] == [frozen != 0, frozen != 1]
    assert grads[frozen] is None
    for index in {0, 1, 2} - {frozen}:
        torch.testing.assert_close(grads[index], expected[index], rtol=1e-10, atol=1e-10)


# gradients -> which of input, weight and bias gradients the convolution's own node still computes
LEFT_DENSE = {"weight": [True, False, False], "input": [False, True, True]}


@pytest.mark.parametrize("gradients", LEFT_DENSE)
def test_the_other_gradient_stays_where_it_was(gradients: str) -> None:
    inputs, kwargs = tensors("bias")
    first, second = (sparse_pass(8, gradients=gradients) for _ in range(2))

    def twice(graph: fx.Graph) -> None:
        first(graph)
        before = str(graph)
        second(graph)
        assert str(graph) == before

    graph, grads = joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, twice)
    assert second.sites == []
    (dense,) = graph.find_nodes(op="call_function", target=dense_backward)
    assert dense.args[-1] == LEFT_DENSE[gradients]
    assert [val is not None for val in dense.meta["val"]] == LEFT_DENSE[gradients]
    (reduced,) = graph.find_nodes(op="call_function", target=reduced_conv_backward)
    assert reduced.args[-2] == [not is_dense for is_dense in LEFT_DENSE[gradients][:2]]
    assert first.sites[0].sparse_flops * 2 == first.sites[0].flops == first.total_flops
    assert first.sites[0].saved_flops(kept=2) == first.total_flops * 3 // 8
    sparse = masked_gradients(inputs, kwargs)
    whole = torch.autograd.grad(functional.conv2d(*inputs, **kwargs).square().sum(), inputs)
    for grad, is_dense, *both in zip(grads, LEFT_DENSE[gradients], sparse, whole, strict=True):
        torch.testing.assert_close(grad, both[is_dense], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("gradients", "frozen"), [("weight", (1, 2)), ("input", (0,))])
def test_a_site_without_the_gradient_that_is_sparse_stays_dense(
    gradients: str, frozen: tuple[int, ...]
) -> None:
    inputs, kwargs = tensors("bias")
    for index in frozen:
        inputs[index].requires_grad_(False)
    sparse = sparse_pass(8, gradients=gradients)
    graph, _ = joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, sparse)
    assert count(graph, aten.topk.default) == 0
    assert sparse.sites[0].reason == f"it computes no {gradients} gradient"
    assert sparse.sites[0].sparse_flops == sparse.sites[0].saved_flops(kept=2) == 0


def test_every_new_node_is_described() -> None:
    inputs, kwargs = tensors("bias")
    graph, _ = joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, sparse_pass(8))
    inserted = [node for node in graph.nodes if node.meta.get(INSERTED_KEY)]
    assert len(inserted) > 8
    for node in inserted:
        assert "val" in node.meta, node
        assert node.meta["partitioner_tag"] == "is_backward"
        assert node.meta["seq_nr"] is not None
    (read,) = graph.find_nodes(op="call_function", target=aten._local_scalar_dense.default)
    assert read.meta["unbacked_bindings"]


def test_channels_last_gradients_are_gathered_channels_last() -> None:
    inputs, kwargs = tensors("plain")
    inputs = [x.detach().to(memory_format=torch.channels_last).requires_grad_() for x in inputs]
    graph, _ = joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, sparse_pass(8))
    (node,) = graph.find_nodes(op="call_function", target=reduced_conv_backward)
    assert node.args[-1] is True
    assert node.args[0].meta["val"].is_contiguous(memory_format=torch.channels_last)


def test_leaves_excluded_and_foreign_layers_dense() -> None:
    inputs, kwargs = tensors("plain")
    for sparse, reason in (
        (sparse_pass(8, excluded="filtered out by filter_fn"), "filtered out by filter_fn"),
        (sparse_pass(16), "its weight is not that of its module"),
    ):
        graph, _ = joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, sparse)
        assert [site.reason for site in sparse.sites] == [reason]
        assert count(graph, aten.topk.default) == 0


def test_leaves_graphs_without_convolutions_alone() -> None:
    sparse = sparse_pass(8)
    x = torch.randn(2, 4, 4, requires_grad=True)
    graph, _ = joint_graph(lambda x: (x @ x).relu(), [x], 1, sparse)
    assert [site.reason for site in sparse.sites] == [UNKNOWN]
    assert not any(node.meta.get(INSERTED_KEY) for node in graph.nodes)
    assert sparse.total_flops == 2 * 2 * 2 * 4**3


def test_leaves_inference_graphs_alone() -> None:
    sparse = sparse_pass(8)
    graph = fx.symbolic_trace(lambda x, w: functional.conv2d(x, w)).graph
    before = str(graph)
    sparse(graph)
    assert not is_joint_graph(graph)
    assert str(graph) == before
    assert not sparse.ran


def test_a_second_run_changes_nothing() -> None:
    inputs, kwargs = tensors("plain")
    first, second = sparse_pass(8), sparse_pass(8)

    def twice(graph: fx.Graph) -> None:
        first(graph)
        before = str(graph)
        second(graph)
        assert str(graph) == before

    joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, twice)
    assert len(first.sites) == 1
    assert second.sites == []


def test_counts_flops_of_the_dense_backward() -> None:
    inputs, kwargs = tensors("plain")
    sparse = sparse_pass(8)
    joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, sparse)
    products = 2 * 8 * 6 * 6 * 3 * 3 * 3
    assert sparse.sites[0].flops == sparse.total_flops == 2 * 2 * products


def test_passes_run_in_order() -> None:
    inputs, kwargs = tensors("plain")
    seen = []

    def note(graph: fx.Graph) -> None:
        seen.append(count(graph, aten.topk.default))

    passes = PassList([note, sparse_pass(8), note])
    joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, passes)
    assert seen == [0, 1]
    assert passes.uuid() is None, "a pass without identity must turn the caches off"
    known = [PassList([sparse_pass(8)]), PassList([sparse_pass(8), TwoStepSumsPass()])]
    assert len({passes.uuid() for passes in known} - {None}) == 2


def test_a_run_is_summed_up_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    inputs, kwargs = tensors("plain")
    sparse, dense = sparse_pass(8), sparse_pass(8, excluded="the classifier")
    with caplog.at_level(logging.INFO, logger="ssprop_passes"):
        for graph_pass in (sparse, dense):
            joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, graph_pass)
    assert str(sparse.summary) == "1 matched, 1 rewritten"
    left = "1 matched, 0 rewritten, 1 left dense (the classifier: 1)"
    assert str(dense.summary) == left
    assert caplog.messages[1].startswith(f"SparseBackwardPass: {left}, ")
    assert caplog.messages[1].endswith(" ms")


def test_uuid_changes_with_what_changes_the_rewrite() -> None:
    def uuid(**changes: object) -> str | None:
        sparse = sparse_pass(8)
        for name, value in changes.items():
            setattr(sparse, name, value)
        return sparse.uuid()

    assert uuid() == uuid()
    others = [
        uuid(slots={"layer": Slot(1, "layer", 8)}),
        uuid(excluded={"other": "filtered out by filter_fn"}),
        uuid(layers=("layer", "layer")),
        uuid(selection=Selection(score=mean_abs)),
        uuid(selection=Selection(select=sampled)),
        uuid(selection=Selection(gradients="weight")),
        uuid(selection=Selection(block=2)),
        uuid(selection=Selection(memory=0.5)),
        uuid(selection=Selection(ranks=Ranks("0", 2))),
        uuid(selection=Selection(ranks=Ranks("0", 4))),
        uuid(selection=Selection(ranks=Ranks("1", 2))),
        uuid(memories=("layer",)),
        uuid(selection=Selection(select=lambda scores, k: scores.argsort()[:k])),
        uuid(selection=Selection(select=lambda scores, k: scores.argsort()[-k:])),
    ]
    assert all(others)
    assert len({uuid(), *others}) == 15
    stateful = [1]
    assert uuid(selection=Selection(select=stateful.pop)) is None, "unknown turns the caches off"


def test_a_failure_in_the_pass_is_an_error_of_ours() -> None:
    inputs, kwargs = tensors("plain")
    sparse = sparse_pass(8)
    sparse.slot_count = 5  # no such input
    with pytest.raises(Exception, match="runtime sparsity tensor") as caught:
        joint_graph(lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, sparse)
    chain = [caught.value, getattr(caught.value, "inner_exception", None)]
    assert any(isinstance(error, SsPropCompileError) for error in chain)


@pytest.mark.parametrize("gradients", ["both", "weight", "input"])
def test_bias_gradient_split_off_by_the_compiler_follows_the_weights(gradients: str) -> None:
    """On GPU Inductor computes the bias gradient as a dense sum outside the convolution's node."""
    inputs, kwargs = tensors("bias")
    sparse = sparse_pass(8, gradients=gradients)

    def split_then_sparse(graph: fx.Graph) -> None:
        (node,) = graph.find_nodes(op="call_function", target=dense_backward)
        (bias,) = [user for user in node.users if user.args[1] == 2]
        with graph.inserting_before(node):
            total = graph.call_function(aten.sum.dim_IntList, (node.args[0], [0, 2, 3]))
        total.meta = {**node.meta, "val": bias.meta["val"]}
        bias.replace_all_uses_with(total)
        graph.erase_node(bias)
        node.args = (*node.args[:-1], [True, True, False])
        sparse(graph)
        assert (total in graph.nodes) == (gradients == "input")

    _, grads = joint_graph(
        lambda *xs: functional.conv2d(*xs, **kwargs), inputs, 1, split_then_sparse
    )
    masked = masked_gradients(inputs, kwargs)
    dense = torch.autograd.grad(functional.conv2d(*inputs, **kwargs).square().sum(), inputs)
    is_dense = LEFT_DENSE.get(gradients, [False] * 3)
    for grad, whole, *both in zip(grads, is_dense, masked, dense, strict=True):
        torch.testing.assert_close(grad, both[whole], rtol=1e-10, atol=1e-10)


def test_a_keep_count_is_taken_for_a_fifth_of_the_channels() -> None:
    inputs = [torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(40, 3, 3, 3)]
    graph, _ = joint_graph(functional.conv2d, inputs, 1, sparse_pass(40))
    (read,) = graph.find_nodes(op="call_function", target=aten._local_scalar_dense.default)
    size = read.meta["val"].node
    assert size.shape_env.var_to_hint_override[size.expr] == 8


def test_smallest_keep_count_is_that_of_the_torch_release() -> None:
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert (MIN_KEEP_COUNT == 1) == (release >= (2, 15))
