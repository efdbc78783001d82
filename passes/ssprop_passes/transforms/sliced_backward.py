"""slice_backward: the same backward graph at the batch size k, on the kept samples alone.

The graph comes from the partitioner, with the batch size as a symbol s. No node changes: s now
stands for k, and every input that holds samples is gathered first.

    before    saved [s, C], s                       ->  ... = f(saved, s)
    after     saved [n, C], s, n, kept [s]          ->  ... = f(saved[kept], s)

Inductor fuses a gather with the kernels that read it. At run time the caller passes k for s,
`k * m` for each input `s * m`, the batch size for n, and the kept samples.

Private torch: symbols of the shape environment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic

from ssprop_passes.graph.batch_dims import BATCH_DIM_KEY, BatchDim, batch_dim_maybe, size_expr
from ssprop_passes.graph.sample_marker import MARKER
from ssprop_passes.kernels.operators import gather_weight
from ssprop_passes.selection.gather_scatter import dims_order

__all__ = ["SlicedGraph", "slice_backward"]

aten = torch.ops.aten


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
    positions = {placeholders.index(node): _position(node, batch) for node in gradients}
    slicer = _Slicer(graph, placeholders, batch)
    sizes = []
    for number, (node, example) in enumerate(zip(placeholders, examples, strict=True)):
        if isinstance(example, Tensor):
            # Dynamo cannot guard on a size of ours.
            with slicer.shapes.suppress_guards():
                slicer.gather(node, example)
        elif isinstance(example, torch.SymInt) and batch in size_expr(example).free_symbols:
            if batch in sympy.cancel(size_expr(example) / batch).free_symbols:
                raise RuntimeError(
                    f"the backward takes the size {example}, which is no multiple of the batch size"
                )
            sizes.append(number)
    results = cast(Sequence[Any], graph.output_node().args[0])
    scattered = {
        number: _position(result, batch)
        for number, result in enumerate(results)
        if isinstance(result, fx.Node)
        and isinstance(result.meta.get("val"), Tensor)
        and batch_dim_maybe(result.meta["val"], batch) is not None
    }
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


class _Slicer:
    """Gathers inputs of one backward graph."""

    def __init__(
        self, graph: fx.Graph, placeholders: Sequence[fx.Node], batch: sympy.Symbol
    ) -> None:
        self._graph = graph
        self._batch = batch
        self._mode = cast(
            FakeTensorMode, detect_fake_mode([node.meta.get("val") for node in placeholders])
        )
        shapes = self._mode.shape_env
        assert shapes is not None
        self.shapes: Any = shapes
        k = self._symint(batch)
        self._whole = self.shapes.create_symbol(
            k.node.hint, ConstantSource("ssprop_batch"), DimDynamic.DYNAMIC, constraint_dim=None
        )
        self._last = placeholders[-1]
        self._size = self._placeholder("ssprop_batch", self._symint(self._whole))
        # Not of any input: the number of the choice is on the CPU.
        device = next(n.meta["val"].device for n in placeholders if "tangents" in str(n.target))
        with self._mode:
            indices = torch.empty([k], dtype=torch.int64, device=device)
        self._kept = self._placeholder("ssprop_kept", indices)
        self._pooled = _shapes_of_pool_gradients(graph)

    def gather(self, node: fx.Node, example: Tensor) -> None:
        """Gather the kept samples of an input, if it holds samples.

        Args:
            node: the placeholder.
            example: its example value.
        """
        if batch_dim_maybe(example, self._batch) is None:
            node.meta = {**node.meta, "val": example}
            return
        position, users = _position(node, self._batch), list(node.users)
        # The partitioner shares the metadata with the forward graph.
        node.meta = {**node.meta, "val": self._whole_batch(example)}
        if not users:
            return
        self._first_user = min(users)
        order = dims_order(node.meta["val"])
        x = node
        # In memory order, so that the result has the same memory order.
        is_ordered = order == sorted(order)
        if not is_ordered:
            x = self._call(aten.permute.default, x, order)
        dim = order.index(position.dim)
        if position.is_plain and dim == 0 and self._meets_a_pool(example):
            x = self._call(gather_weight, x, self._kept, False)
        elif position.is_plain:
            x = self._call(aten._unsafe_index.Tensor, x, [*[None] * dim, self._kept])
        else:
            parts = [_static(position.outer), self._size, _static(position.inner)]
            merged = self._sizes(x)
            x = self._call(aten.view.default, x, [*merged[:dim], *parts, *merged[dim + 1 :]])
            x = self._call(aten._unsafe_index.Tensor, x, [*[None] * (dim + 1), self._kept])
            x = self._call(aten.reshape.default, x, [*merged[:dim], -1, *merged[dim + 1 :]])
        if not is_ordered:
            x = self._call(aten.permute.default, x, [order.index(d) for d in range(len(order))])
        for user in users:
            user.replace_input_with(node, x)

    def _meets_a_pool(self, example: Tensor) -> bool:
        """Say whether the gradient of a max pool meets this input, in channels last.

        That gradient is contiguous. A kernel that reads both layouts is tiled, unless it also looks
        up rows by index: then it takes the time of the whole batch. So the gather must be a copy,
        by an operator that Inductor does not look into.
        """
        is_channels_last = example.ndim == 4 and not example.is_contiguous()
        return is_channels_last and tuple(map(size_expr, example.shape)) in self._pooled

    def _sizes(self, node: fx.Node) -> list[Any]:
        """Return the sizes of a node, as graph nodes where they are symbolic."""
        shape = node.meta["val"].shape
        return [
            size if isinstance(size, int) else self._call(aten.sym_size.int, node, d)
            for d, size in enumerate(shape)
        ]

    def _whole_batch(self, example: Tensor) -> Tensor:
        """Return a fake tensor like `example`, with the batch size n in place of k."""

        def of_all(size: Any) -> Any:
            expr = size_expr(size)
            if self._batch not in expr.free_symbols:
                return size
            return self._symint(expr.subs(self._batch, self._whole))

        with self._mode:
            return torch.empty_strided(
                [of_all(size) for size in example.shape],
                [of_all(stride) for stride in example.stride()],
                dtype=example.dtype,
                device=example.device,
            )

    def _symint(self, expr: sympy.Expr) -> Any:
        return self.shapes.create_symintnode(expr, hint=None)

    def _placeholder(self, name: str, value: Any) -> fx.Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.placeholder(name)
        self._last.meta["val"] = value
        return self._last

    def _call(self, target: Any, *args: Any) -> fx.Node:
        # As late as possible: gathers side by side would become one kernel, early and from and to
        # cold memory.
        with self._graph.inserting_before(self._first_user):
            result = self._graph.call_function(target, args)
        values = fx.map_arg(args, lambda node: node.meta["val"])
        with self._mode:
            result.meta["val"] = target(*values)
        return result


def _shapes_of_pool_gradients(graph: fx.Graph) -> set[tuple[sympy.Expr, ...]]:
    """Return the shapes of the gradients of max pools, which Inductor writes by `scatter_add`."""
    return {
        tuple(map(size_expr, user.meta["val"].shape))
        for node in graph.find_nodes(op="call_function", target=aten.scatter_add.default)
        for user in node.users
        if user.target in (aten.view.default, aten.reshape.default)
    }


def _position(node: fx.Node, batch: sympy.Symbol) -> BatchDim:
    found: BatchDim | None = node.meta.get(BATCH_DIM_KEY)
    if found is None:
        at = batch_dim_maybe(node.meta["val"], batch)
        assert at is not None
        dim, rows = at
        if rows != 1:
            raise RuntimeError(f"the backward takes {node}, whose samples are in unknown order")
        found = BatchDim(dim, sympy.Integer(1), sympy.Integer(1))
    return found


def _static(size: sympy.Expr) -> int:
    return int(size) if size.is_Integer else -1


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
