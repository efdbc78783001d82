"""slice_backward: the same backward graph at the batch size k, on the kept samples alone.

The graph comes from the partitioner, with the batch size as a symbol s. No node changes: s now
stands for k, and every input that holds samples is gathered first.

    before    saved [s, C], s                       ->  ... = f(saved, s)
    after     saved [n, C], s, n, kept [s]          ->  ... = f(saved[kept], s)

At run time the caller passes k for s, `k * m` for each input `s * m`, the batch size for n, and the
kept samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx

from ssprop_passes.graph.batch_dim import BATCH_DIM_KEY, BatchDim, batch_dim_maybe, size_expr
from ssprop_passes.graph.sample_marker import MARKER
from ssprop_passes.transforms.sample_inputs import SampleInputs, sample_position
from ssprop_passes.transforms.small_batches import keep_onednn

__all__ = ["SlicedGraph", "slice_backward"]


@dataclass(frozen=True)
class SlicedGraph:
    """A backward that was sliced, and how to call it.

    Its inputs are those of the whole backward, the gradient that `head` returns if there is a head,
    the batch size, and the kept samples, int64 [k].

    Attributes:
        examples: example inputs.
        head: what runs before on the whole batch, with the inputs of the whole backward: it returns
            the gradient from which samples are chosen, in a tuple. None if that is a tangent.
        choice: position of the number of the choice.
        sizes: positions of the inputs that are multiples of the batch size.
        gradients: position of each gradient from which samples are chosen -> where it has them.
        scattered: position of each result that has only the kept samples -> where it has them.
    """

    examples: list[Any]
    head: fx.GraphModule | None
    choice: int
    sizes: tuple[int, ...]
    gradients: dict[int, BatchDim]
    scattered: dict[int, BatchDim]


def slice_backward(
    gm: fx.GraphModule, inputs: Sequence[Any], batch: sympy.Symbol
) -> SlicedGraph | None:
    """Make a backward graph run on the kept samples alone, in place.

    Args:
        gm: the backward, as the partitioner made it from a graph with a marker.
        inputs: its example inputs, whose strides are those at run time.
        batch: the symbol of the batch size.

    Returns:
        How to call it; None if the graph has no marker.

    Raises:
        RuntimeError: the graph computes something over the whole batch again, or takes a size that
            is no multiple of the batch size.
    """
    graph = gm.graph
    markers = graph.find_nodes(op="call_function", target=MARKER)
    if not markers:
        return None
    (marker,) = markers
    gradient, choice = cast(tuple[fx.Node, fx.Node], marker.args)
    marker.replace_all_uses_with(gradient)
    graph.erase_node(marker)
    placeholders = graph.find_nodes(op="placeholder")
    examples, head = list(inputs), None
    gradients = [node for node in placeholders if "tangents" in str(node.target)]
    if gradient not in placeholders:
        head = _split_head(gm, gradient)
        placeholders = graph.find_nodes(op="placeholder")
        gradients = placeholders[-1:]
        examples.append(gradients[0].meta["val"])
    _check_whole_batch(graph, gradients)
    positions = {placeholders.index(node): sample_position(node, batch) for node in gradients}
    gathered = SampleInputs(graph, placeholders, batch)
    sizes = []
    for number, (node, example) in enumerate(zip(placeholders, examples, strict=True)):
        if isinstance(example, Tensor):
            # Dynamo cannot guard on a size of ours.
            with gathered.shapes.suppress_guards():
                gathered.gather(node, example)
        elif isinstance(example, torch.SymInt) and batch in size_expr(example).free_symbols:
            if batch in sympy.cancel(size_expr(example) / batch).free_symbols:
                raise RuntimeError(
                    f"the backward takes the size {example}, which is no multiple of the batch size"
                )
            sizes.append(number)
    results = cast(Sequence[Any], graph.output_node().args[0])
    scattered = {
        number: sample_position(result, batch)
        for number, result in enumerate(results)
        if isinstance(result, fx.Node)
        and isinstance(result.meta.get("val"), Tensor)
        and batch_dim_maybe(result.meta["val"], batch) is not None
    }
    keep_onednn(graph)
    graph.eliminate_dead_code()
    graph.lint()
    gm.recompile()
    return SlicedGraph(
        [node.meta["val"] for node in graph.find_nodes(op="placeholder")],
        head,
        placeholders.index(choice),
        tuple(sizes),
        positions,
        scattered,
    )


def _split_head(gm: fx.GraphModule, gradient: fx.Node) -> fx.GraphModule:
    """Cut a graph at a node through which all results depend on the tangents.

    Returns:
        The part before, with the same placeholders. In the graph itself the node becomes the last
        placeholder.
    """
    graph, head = gm.graph, fx.Graph()
    environment: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        environment[node] = head.node_copy(node, environment.__getitem__)
        if node is gradient:
            break
    head.output((environment[gradient],)).meta = dict(graph.output_node().meta)
    head.eliminate_dead_code()
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        begin = graph.placeholder("tangents_of_samples")
    begin.meta = dict(gradient.meta)
    gradient.replace_all_uses_with(begin)
    graph.eliminate_dead_code()
    return fx.GraphModule(gm, head)


def _check_whole_batch(graph: fx.Graph, begin: Sequence[fx.Node]) -> None:
    """Raise a RuntimeError if the backward reduces what the forward computed over the batch."""
    gradients = set(begin)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if not gradients.isdisjoint(node.all_input_nodes):
            gradients.add(node)
            continue
        value = node.meta.get("val")
        of_samples = any(BATCH_DIM_KEY in operand.meta for operand in node.all_input_nodes)
        if of_samples and isinstance(value, Tensor) and BATCH_DIM_KEY not in node.meta:
            raise RuntimeError(f"the backward computes {node} again, from the kept samples alone")
