"""SampleInputs: gathers the kept samples of the inputs of a backward graph.

Inductor fuses a gather with the kernels that read it, so gathers stand where they are first read.

Private torch: symbols of the shape environment.
"""

from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic

from ssprop_passes.graph.batch_dim import BATCH_DIM_KEY, BatchDim, batch_dim_maybe, size_expr
from ssprop_passes.kernels.operators import gather_weight
from ssprop_passes.selection.gather_scatter import dims_order

__all__ = ["SampleInputs", "sample_position"]

aten = torch.ops.aten


class SampleInputs:
    """Makes the inputs of one backward graph hold the whole batch, and gathers what it reads.

    Args:
        graph: the graph; it gets two placeholders more, the batch size and the kept samples.
        placeholders: its placeholders.
        batch: the symbol of the batch size, which stands for k from now on.

    Attributes:
        shapes: the shape environment of its symbols.
    """

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
        position, users = sample_position(node, self._batch), list(node.users)
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


def sample_position(node: fx.Node, batch: sympy.Symbol) -> BatchDim:
    """Return where a node holds the samples.

    Raises:
        RuntimeError: their order is unknown.
    """
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


def _shapes_of_pool_gradients(graph: fx.Graph) -> set[tuple[sympy.Expr, ...]]:
    """Return the shapes of the gradients of max pools, which Inductor writes by `scatter_add`."""
    return {
        tuple(map(size_expr, user.meta["val"].shape))
        for node in graph.find_nodes(op="call_function", target=aten.scatter_add.default)
        for user in node.users
        if user.target in (aten.view.default, aten.reshape.default)
    }
