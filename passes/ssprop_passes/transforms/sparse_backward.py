"""SparseBackwardPass: every site's backward from its k strongest channels, k read at run time.

Why on the joint graph: forward and backward are partitioned afterwards, so that what the sparse
backward does not need is not saved, and what it adds is fused with its neighbours.

    before    dx, dw = backward(dy, x, w)

    after     k = keep_counts[slot].item()
              dx, dw = sparse_backward(dy, x, w, k)

With a memory, another input of the graph, `sparse_backward` writes it in place. With telemetry, one
more input, the graph ends with a write of what all sites tell. Where the keep counts are constants,
k is a plain int, and the graph has no such input.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from ssprop_passes.graph.graph_pass import GraphPass, Previous
from ssprop_passes.graph.rewrite import INSERTED_KEY, Replacer
from ssprop_passes.kernels.operators import register_flops
from ssprop_passes.selection.error_feedback import MEMORY_KEY, Remembered
from ssprop_passes.selection.observe import observe, write_rows
from ssprop_passes.selection.policy import Selection, dims_order, with_order
from ssprop_passes.sites.matchers import MATCHERS
from ssprop_passes.sites.site import (
    Site,
    SiteMatch,
    Slot,
    layer_name,
    matrix_product_flops,
    why_dense,
)
from ssprop_passes.transforms.gate import Gate, why_slower
from ssprop_passes.transforms.keep_count_input import find_keep_counts, read_keep_count
from ssprop_passes.transforms.sample_axis import SampleAxis

__all__ = ["SparseBackwardPass", "find_sites"]


class SparseBackwardPass(GraphPass):
    """Makes the backward of the layers that have a slot sparse.

    Args:
        slots: the layers that take part, by name.
        excluded: the layers that do not, by name, with the reason.
        layers: the layer that each marked node of the forward graph belongs to, in order: part of
            the identity, because equal graphs of different models must not share an artifact.
        slot_count: length of the runtime sparsity tensor, the graph's last input.
        decompositions: returns the decomposition table of the compiler that the graph is for.
        selection: how channels are chosen, and for which gradients.
        gate: says which sites are worth making sparse; None to make all.
        memories: layers that the graph's memories are of, one an entry, as many for each call as
            `selection.remembers`; the memories are inputs of the graph, its last but for the
            runtime sparsity tensor.
        telemetry: whether the sites tell of themselves; their table is an input of the graph,
            right before the memories.
        previous: pass or passes to run first.
        constants: keep count of each slot where they are constants; the graph then has no runtime
            sparsity tensor.
        batch: samples of the batch, maybe a SymInt, where the selection is of those, else None.

    Attributes:
        sites: what became of each site, after a run.
        total_flops: floating-point operations of all backward convolutions and matrix products.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        excluded: Mapping[str, str],
        layers: tuple[str, ...],
        slot_count: int,
        decompositions: Callable[[], dict[Any, Callable[..., Any]]],
        selection: Selection = Selection(),
        gate: Gate | None = None,
        memories: Sequence[str] = (),
        telemetry: bool = False,
        previous: Previous = None,
        constants: Sequence[int] | None = None,
        batch: int | None = None,
    ) -> None:
        super().__init__(previous)
        self.slots = slots
        self.excluded = excluded
        self.layers = layers
        self.slot_count = slot_count
        self._replacer = Replacer(decompositions)
        self.selection = selection
        self.gate = gate
        self.memories = tuple(memories)
        self.constants = None if constants is None else tuple(constants)
        self.telemetry = telemetry
        self.samples = None if batch is None else SampleAxis(batch, selection, self._replacer)
        self.sites: list[Site] = []
        self.total_flops = 0

    def identity(self) -> str | None:
        """Return the slots, exclusions and layers of this graph, and how channels are chosen."""
        selection = self.selection.identity
        if selection is None:
            return None
        slots, excluded = sorted(self.slots.items()), sorted(self.excluded.items())
        gate = self.gate and self.gate.identity()
        state = self.memories, self.telemetry, self.constants
        return repr((slots, excluded, self.layers, selection, gate, state))

    def transform(self, graph: fx.Graph) -> None:
        """Rewrite every site that has a slot; record all of them."""
        # What runs after this pass may ask for them.
        register_flops()
        inputs = find_inputs(graph)
        keep_counts = None
        if self.constants is None:
            keep_counts = find_keep_counts(inputs, self.slot_count)
            inputs = inputs[: inputs.index(keep_counts)]
        # Before the keep counts lie the memories, and before these the table.
        first = len(inputs) - len(self.memories)
        memories = inputs[first:]
        rows: dict[int, fx.Node] = {}
        counts: dict[int, fx.Node] = {}
        found, self.total_flops = find_sites(graph, self.slots, self.excluded, self.selection)
        for node, site in found:
            if not site.reason:
                # Matched anew: what the rewrite of another site replaced may be an input of it.
                match = find_match_maybe(node)
                assert match is not None
                site = self._judge(match, site)
                if not site.reason and self.samples:
                    assert keep_counts is not None, "samples have no constant keep counts"
                    self.samples.rewrite(match, keep_counts, site.slot)
                elif not site.reason:
                    size = len(self.selection.remembers)
                    begin = (_memory_maybe(match) or 0) * size
                    memory = memories[begin : begin + size]
                    if keep_counts is not None and site.slot not in counts:
                        counts[site.slot] = self._read(match, keep_counts, site.slot)
                    row = self._rewrite(match, counts.get(site.slot), site.slot, memory)
                    if row is not None:
                        # Of a layer that is called several times, the last call in the backward.
                        rows[site.slot] = row
            self.sites.append(site)
        if rows:
            self._write(graph, inputs[first - 1], rows)

    def _judge(self, match: SiteMatch, site: Site) -> Site:
        """Return a site with what is yet to be said of it, by the gate above all."""
        if self.selection.remembers and _memory_maybe(match) is None:
            reason = "no convolution or linear call gives its output, so it has no memory"
            return replace(site, slot=-1, sparse_flops=0, reason=reason)
        if self.samples:
            if reason := self.samples.why_dense(match):
                return replace(site, slot=-1, sparse_flops=0, reason=reason)
            site = replace(site, channels=self.samples.size, groups=1)
        if self.gate is None:
            return site
        batch = self.samples.size if self.samples else None
        times = self.gate.times(match, site.slot, self.selection, batch)
        if reason := why_slower(times, site.channels, self.selection.axis):
            return replace(site, slot=-1, sparse_flops=0, reason=reason, times=times)
        return replace(site, times=times)

    def _read(self, match: SiteMatch, keep_counts: fx.Node, slot: int) -> fx.Node:
        """Read a slot's keep count, in blocks, before the first site of the slot.

        Once for all of them: torch would merge two reads, and know nothing of the second's symbol.
        """
        limit, block = match.channels // match.groups, self.selection.block

        def read(keep_counts: Tensor) -> tuple[int]:
            return (read_keep_count(keep_counts, slot, limit, block),)

        (count,) = self._replacer.insert(match.node, read, [keep_counts])
        assert count is not None
        return count

    def _rewrite(
        self,
        match: SiteMatch,
        count: fx.Node | None,
        slot: int,
        memory: Sequence[fx.Node],
    ) -> fx.Node | None:
        """Put a site's sparse backward in its place; return the row that it tells, if it does."""
        operands = len(match.inputs)
        inputs = [*match.inputs, *memory, *([] if count is None else [count])]
        orders = [None if dense is None else dims_order(dense) for dense in match.dense_gradients]

        def replacement(*tensors: Any) -> Any:
            if self.constants is not None:
                k = self.constants[slot]
            else:
                k = tensors[-1] if self.selection.block == 1 else tensors[-1] * self.selection.block
            rows: list[Tensor] = []
            selection = self.selection
            if self.telemetry:
                selection = replace(selection, observer=lambda *seen: rows.append(observe(*seen)))
            remembered = zip(selection.remembers, tensors[operands:], strict=False)
            gradients = match.backward_of_parts(
                k, selection, *tensors[:operands], memory=Remembered(**dict(remembered))
            )
            # What follows in the graph may be views that only the dense gradient's layout allows.
            laid_out = [
                gradient if gradient is None or order is None else with_order(gradient, order)
                for gradient, order in zip(gradients, orders, strict=True)
            ]
            return *laid_out, *rows

        k = None if self.constants is None else self.constants[slot]
        form = match.form
        key = None if form is None else (form, str(orders), k)
        outputs = self._replacer.insert(match.node, replacement, inputs, key)
        match.replace(outputs[:3])
        return outputs[3] if self.telemetry else None

    def _write(self, graph: fx.Graph, table: fx.Node, rows: Mapping[int, fx.Node]) -> None:
        """End the graph with a write of the sites' rows, by slot, into the table."""
        positions = {slot: i for i, slot in enumerate(rows)}

        def write(table: Tensor, *rows: Tensor) -> tuple[()]:
            write_rows(table, rows, positions)
            return ()

        self._replacer.insert(graph.output_node(), write, [table, *rows.values()])


def _memory_maybe(match: SiteMatch) -> Any:
    """Return the number of a site's call among those that have memories, None if it has none."""
    return (match.node.meta.get("custom") or {}).get(MEMORY_KEY)


def find_sites(
    graph: fx.Graph,
    slots: Mapping[str, Slot],
    excluded: Mapping[str, str],
    selection: Selection = Selection(),
) -> tuple[list[tuple[fx.Node, Site]], int]:
    """Find the sites of a joint graph, and leave the graph as it is.

    Args:
        graph: the joint graph.
        slots: the layers that take part, by name.
        excluded: the layers that do not, by name, with the reason.
        selection: says which gradients are sparse.

    Returns:
        The first node of each site with what is to become of the site, in graph order; and the
        floating-point operations of all backward convolutions and matrix products.
    """
    found: list[tuple[fx.Node, Site]] = []
    total_flops = 0
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        is_forward = node.meta.get("partitioner_tag") == "is_forward"
        if is_forward or node in seen or node.meta.get(INSERTED_KEY):
            continue
        match = find_match_maybe(node)
        total_flops += match.flops if match else matrix_product_flops(node)
        if match is None:
            continue
        seen.update(match.nodes)
        name = layer_name(node)
        reason = why_dense(match, name, slots, excluded, selection)
        site = Site(
            name or "", match.kind, match.channels, match.groups, match.flops, reason=reason
        )
        if not reason:
            sparse_flops = match.flops_of(selection.sparse(match.wanted))
            site = replace(site, slot=slots[site.name].index, sparse_flops=sparse_flops)
        found.append((node, site))
    return found, total_flops


def find_match_maybe(node: fx.Node) -> SiteMatch | None:
    """Return what the first kind of site that recognises the node makes of it."""
    return next((match for matcher in MATCHERS if (match := matcher(node))), None)


def find_inputs(graph: fx.Graph) -> list[fx.Node]:
    """Return the placeholders of a joint graph that are inputs of the forward, in order."""
    placeholders: list[fx.Node] = graph.find_nodes(op="placeholder")
    return [node for node in placeholders if str(node.target).startswith("primals")]
