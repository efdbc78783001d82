"""KeptSamplesPass: prepares a joint graph for a backward of the kept samples alone.

Forward and backward of a joint graph are partitioned afterwards, and then `slice_backward` runs the
whole backward at the batch size k. The backward takes what the forward saved, at the kept rows, and
computes the rest again, from the kept rows. This pass makes both right:

-   What a forward node computes over the whole batch, such as the statistics of a batch norm, is
    saved, never computed again. So are random numbers, such as the mask of a dropout.
-   The marker (`graph/sample_marker`) ties the backward to its choice of samples.
-   A graph that moves samples or mixes them is left as it is, with a reason.

    before    ... = f(tangents_1, saved)
    after     ... = f(kept_samples(tangents_1, choice), saved)

If the model returns its loss, the marker goes where the gradient first has samples again.

With `saved="kept"` the backward computes everything else again: then the forward saves its inputs,
and activations of the kept samples alone are ever held at once.

Private torch: the partitioner's policy in `node.meta["recompute"]`.
"""

import operator
from collections import Counter
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from ssprop_passes.graph.batch_dim import BATCH_DIM_KEY, BatchDim
from ssprop_passes.graph.batch_dims import find_batch_dims
from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.sample_marker import MARKER
from ssprop_passes.graph.state_inputs import StateInputs
from ssprop_passes.transforms.keep_count_input import find_state_inputs

__all__ = ["KeptSamplesPass"]


_CONSTANT = (
    "an operation makes the batch size a constant (TORCH_LOGS=dynamic shows where: it says Eq)"
)

_NO_BEGINNING = (
    "an output that has a gradient, such as a loss, is of the batch as a whole, and no tensor that"
    " has samples stands between it and all other gradients"
)


class KeptSamplesPass(GraphPass):
    """Prepares a joint graph for `slice_backward`.

    Args:
        batch: the symbol of the batch size.
        layout: the state inputs of the graph.
        recompute: whether the backward computes all that it can again (`saved="kept"`).

    Attributes:
        reason: why the backward stays whole, after a run; "" if it can be sliced.
    """

    def __init__(
        self, batch: sympy.Symbol, layout: StateInputs[Any], recompute: bool = False
    ) -> None:
        super().__init__()
        self.batch = batch
        self.layout = layout
        self.recompute = recompute
        self.reason = ""

    def identity(self) -> str | None:
        """Return the batch symbol and what is saved; the graph shows its state inputs."""
        return repr((str(self.batch), self.recompute))

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Mark what the backward must not compute again, and where it begins."""
        unknown = find_batch_dims(graph, self.batch)
        tangents = [n for n in graph.find_nodes(op="placeholder") if "tangents" in str(n.target)]
        begin = _find_beginning_maybe(graph, tangents)
        self.reason = next(iter(unknown.values()), "")
        if not self.reason and begin is None:
            is_constant = not any(BATCH_DIM_KEY in node.meta for node in graph.nodes)
            self.reason = _CONSTANT if is_constant else _NO_BEGINNING
        if self.reason:
            return PassSummary(1, 0, Counter([self.reason]))
        assert begin is not None
        backward = _descendants(tangents)
        whole: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op != "call_function" or node in backward:
                continue
            is_part = node.target is operator.getitem and node.args[0] in whole
            if is_part or _depends_on_all(node) or _is_random(node):
                whole.add(node)
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            elif self.recompute:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0
        choice = find_state_inputs(graph, self.layout).choice
        assert choice is not None
        _insert_marker(begin, choice)
        return PassSummary(1 + len(whole), 1 + len(whole))


def _find_beginning_maybe(graph: fx.Graph, tangents: list[fx.Node]) -> fx.Node | None:
    """Return the node where a backward of the kept samples begins, None if there is none.

    It is a tangent if all of them have samples. Otherwise the model returns its loss, say: then it
    is the last node through which every gradient depends on the tangents. For cross entropy that is
    the gradient of the logits.
    """
    if tangents and all(BATCH_DIM_KEY in node.meta for node in tangents):
        return tangents[0]
    begin = None
    after = _descendants(tangents)
    # Tangents and nodes after them that a later node still uses.
    live = {node: len(node.users) for node in tangents if node.users}
    for node in graph.nodes:
        if node not in after or node.op != "call_function":
            continue
        for operand in node.all_input_nodes:
            if operand in live:
                live[operand] -= 1
                if not live[operand]:
                    del live[operand]
        if node.users:
            live[node] = len(node.users)
        if list(live) == [node] and BATCH_DIM_KEY in node.meta:
            begin = node
    return begin


def _descendants(nodes: list[fx.Node]) -> set[fx.Node]:
    found = set(nodes)
    for node in nodes[0].graph.nodes if nodes else ():
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _depends_on_all(node: fx.Node) -> bool:
    """Say whether a node reduces over the batch: an operand has samples, the result has none."""
    values = node.meta.get("val")
    results = values if isinstance(values, (tuple, list)) else [values]
    if not any(BATCH_DIM_KEY in operand.meta for operand in node.all_input_nodes):
        return False
    if isinstance(values, Tensor):
        return BATCH_DIM_KEY not in node.meta
    return any(isinstance(result, Tensor) for result in results)


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    is_seeded = torch.Tag.nondeterministic_seeded in tags
    return is_seeded or "inductor_rand" in str(node.target) or "inductor_seed" in str(node.target)


def _insert_marker(gradient: fx.Node, choice: fx.Node) -> None:
    users = list(gradient.users)
    with gradient.graph.inserting_before(users[0] if users else gradient.graph.output_node()):
        marker = gradient.graph.call_function(MARKER, (gradient, choice))
    value: Any = gradient.meta["val"]
    with value.fake_mode:
        marker.meta["val"] = MARKER(value, choice.meta["val"])
    position: BatchDim = gradient.meta[BATCH_DIM_KEY]
    marker.meta[BATCH_DIM_KEY] = position
    marker.meta["partitioner_tag"] = "is_backward"
    for user in users:
        user.replace_input_with(gradient, marker)
