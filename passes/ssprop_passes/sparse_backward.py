"""SparseBackwardPass: convolution backwards from the k strongest channels, k read at run time.

Why here: on the joint graph every convolution of every model is an `aten.convolution_backward`
node, whatever its source looked like, and forward and backward are partitioned afterwards, so
that what the sparse backward does not need is not saved.

    before    dx, dw, _ = convolution_backward(dy, x, w)

    after     k = keep_counts[slot].item()
              idx = topk(mean(abs(dy)), k)
              dx, dw_k, _ = convolution_backward(dy[:, idx], x, w[idx])
              dw = index_put(zeros, idx, dw_k)
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ssprop_passes.graph_pass import GraphPass
from ssprop_passes.replacement import sparse_conv_backward
from ssprop_passes.rewrite import INSERTED_KEY, replace_outputs, splice, trace
from ssprop_passes.sites import (
    MIN_KEEP_COUNT,
    ConvBackward,
    Site,
    Slot,
    backward_flops,
    match_conv_backward,
    site_name,
    why_dense,
)

__all__ = ["SparseBackwardPass"]

aten = torch.ops.aten


class SparseBackwardPass(GraphPass):
    """Makes the backward of the layers that have a slot sparse.

    Args:
        slots: the layers that take part, by name.
        excluded: the layers that do not, by name, with the reason.
        layers: the layer that each marked node of the forward graph belongs to, in order: part of
            the identity, because equal graphs of different models must not share an artifact.
        slot_count: length of the runtime sparsity tensor, the graph's last input.
        decompositions: returns the decomposition table of the compiler the graph is for.
        previous: pass or passes to run first.

    Attributes:
        sites: what became of each convolution's backward, after a run.
        total_flops: floating-point operations of all backward convolutions and matrix products.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        excluded: Mapping[str, str],
        layers: tuple[str, ...],
        slot_count: int,
        decompositions: Callable[[], dict[Any, Callable[..., Any]]],
        previous: object = None,
    ) -> None:
        super().__init__(previous)
        self.slots = slots
        self.excluded = excluded
        self.layers = layers
        self.slot_count = slot_count
        self.decompositions = decompositions
        self.sites: list[Site] = []
        self.total_flops = 0

    def identity(self) -> str:
        """Return the slots, exclusions and layers of this graph."""
        return repr((sorted(self.slots.items()), sorted(self.excluded.items()), self.layers))

    def transform(self, graph: fx.Graph) -> None:
        """Rewrite every convolution backward that has a slot; record all of them."""
        keep_counts = find_keep_counts(graph, self.slot_count)
        for node in list(graph.nodes):
            if node.meta.get(INSERTED_KEY) or node.meta.get("partitioner_tag") == "is_forward":
                continue
            flops = backward_flops(node)
            self.total_flops += flops
            conv = match_conv_backward(node)
            if conv is None:
                continue
            name = site_name(node)
            reason = why_dense(conv, name, self.slots, self.excluded)
            slot = -1 if reason else self.slots[name or ""].index
            channels = conv.grad_output.meta["val"].shape[1]
            self.sites.append(Site(name or "", conv.kind, channels, flops, slot, reason))
            if not reason:
                self._rewrite(graph, node, conv, keep_counts, slot)

    def _rewrite(
        self, graph: fx.Graph, node: fx.Node, conv: ConvBackward, keep_counts: fx.Node, slot: int
    ) -> None:
        bias_sum = None if conv.output_mask[2] else find_bias_sum(conv, node)
        mask = (*conv.output_mask[:2], conv.output_mask[2] or bias_sum is not None)
        channels = conv.weight.meta["val"].shape[0]

        def replacement(keep_counts: Tensor, grad_output: Tensor, x: Tensor, weight: Tensor) -> Any:
            k = keep_counts[slot].item()
            torch._check(k >= min(MIN_KEEP_COUNT, channels))
            torch._check(k <= channels)
            return sparse_conv_backward(
                grad_output, x, weight, k, conv.stride, conv.padding, conv.dilation, mask
            )

        inputs = [keep_counts, conv.grad_output, conv.input, conv.weight]
        fake_mode = keep_counts.meta["val"].fake_mode
        traced = trace(replacement, inputs, fake_mode, self.decompositions())
        for inner in traced.graph.find_nodes(
            op="call_function", target=aten.convolution_backward.default
        ):
            # Inductor's lowering guards on the weight's size, which is not known here.
            inner.meta["should_fallback"] = True
        outputs = splice(graph, node, traced, inputs)
        if bias_sum is not None:
            bias_sum.replace_all_uses_with(outputs[2])
            graph.erase_node(bias_sum)
        replace_outputs(node, outputs)


def find_keep_counts(graph: fx.Graph, slot_count: int) -> fx.Node:
    """Return the placeholder of the runtime sparsity tensor: the last input of the forward."""
    primals = [n for n in graph.find_nodes(op="placeholder") if str(n.target).startswith("primals")]
    for node in reversed(primals):
        val = node.meta["val"]
        if isinstance(val, Tensor) and val.dtype == torch.int64 and val.shape == (slot_count,):
            return node
    raise RuntimeError(
        f"the joint graph has no runtime sparsity tensor, int64 [{slot_count}], among its inputs"
    )


def find_bias_sum(conv: ConvBackward, node: fx.Node) -> fx.Node | None:
    """Return the sum that is the bias gradient where Inductor split it off, as it does on GPU."""
    ndim = conv.grad_output.meta["val"].ndim
    over = [d for d in range(ndim) if d != 1]
    for user in conv.grad_output.users:
        if (
            user.target is aten.sum.dim_IntList
            and sorted(user.args[1]) == over
            and len(user.args) == 2
            and user.meta.get("seq_nr") == node.meta.get("seq_nr")
            and user.meta.get("partitioner_tag") == "is_backward"
        ):
            return user
    return None
