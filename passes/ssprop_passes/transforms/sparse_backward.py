"""SparseBackwardPass: every site's backward from its k strongest channels, k read at run time.

The pass rewrites the joint graph because forward and backward are partitioned afterwards. Tensors
that the sparse backward does not need are then not saved, and its nodes are fused with their
neighbours.

    before    dx, dw = backward(dy, x, w)

    after     k = keep_counts[slot].item()
              dx, dw = sparse_backward(dy, x, w, k)

Keep counts are a state input of the graph (`StateInputs`). So are a memory, which `sparse_backward`
writes in place, and the telemetry table, which the graph writes at its end. If keep counts are
constants, k is a plain int, and the graph has no such input.
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from ssprop_passes.graph.graph_pass import GraphPass, PassSummary
from ssprop_passes.graph.rewrite import Replacer
from ssprop_passes.graph.state_inputs import StateInputs
from ssprop_passes.kernels.operators import register_flops
from ssprop_passes.selection.error_feedback import MEMORY_KEY
from ssprop_passes.selection.gather_scatter import dims_order, with_order
from ssprop_passes.selection.observe import observe, write_rows
from ssprop_passes.selection.policy import Selection
from ssprop_passes.sites.find import find_match_maybe, find_sites
from ssprop_passes.sites.match import SiteMatch
from ssprop_passes.sites.site import Site, Slot
from ssprop_passes.transforms.gate import Gate, why_slower
from ssprop_passes.transforms.keep_count_input import find_state_inputs, read_keep_count

__all__ = ["SparseBackwardPass"]


class SparseBackwardPass(GraphPass):
    """Makes the backward of every layer with a slot sparse.

    Args:
        slots: layer name -> slot, for the layers that take part.
        excluded: layer name -> reason, for the layers that do not.
        layers: the layer of each marked node of the forward graph, in order. This is part of the
            identity, because equal graphs of different models must not share an artifact.
        slot_count: length of the runtime sparsity tensor.
        decompositions: returns the decomposition table of the compiler that the graph is for.
        selection: how channels are chosen, and for which gradients.
        gate: says which sites are worth making sparse; None makes all sparse.
        memories: the layer of each memory of the graph, one memory per call.
        telemetry: whether the sites report what they keep.
        constants: keep count of each slot, if keep counts are constants.
        chooses_samples: whether the graph has the choice of samples as a state input.
        trained: names of the layers whose weights get a gradient.

    Attributes:
        sites: what became of each site, after a run.
        total_flops: FLOPs of all backward convolutions and matrix products.
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
        constants: Sequence[int] | None = None,
        chooses_samples: bool = False,
        trained: Container[str] = (),
    ) -> None:
        super().__init__()
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
        self.chooses_samples = chooses_samples
        self.trained = trained
        self.sites: list[Site] = []
        self.total_flops = 0

    def identity(self) -> str | None:
        """Return the slots, exclusions and layers of this graph, and how channels are chosen."""
        selection = self.selection.identity
        if selection is None:
            return None
        slots, excluded = sorted(self.slots.items()), sorted(self.excluded.items())
        gate = self.gate and self.gate.identity()
        state = self.memories, self.telemetry, self.constants, self.chooses_samples
        return repr((slots, excluded, self.layers, selection, gate, state))

    @property
    def state_layout(self) -> StateInputs[object]:
        """Which state inputs the graph has."""
        return StateInputs(
            table=True if self.telemetry else None,
            memories=self.memories,
            keep_counts=None if self.constants is not None else True,
            choice=True if self.chooses_samples else None,
        )

    def transform(self, graph: fx.Graph) -> PassSummary:
        """Rewrite every site that has a slot; record all sites."""
        # Code that runs after this pass may ask for FLOPs.
        register_flops()
        state = find_state_inputs(graph, self.state_layout, self.slot_count)
        rows: dict[int, fx.Node] = {}
        counts: dict[int, fx.Node] = {}
        found, self.total_flops = find_sites(
            graph, self.slots, self.excluded, self.selection, self.trained
        )
        for node, site in found:
            if not site.reason:
                # Match again: the rewrite of another site may have replaced an input of this one.
                match = find_match_maybe(node)
                assert match is not None
                site = self._judge(match, site)
                if not site.reason:
                    call = _memory_maybe(match) if state.memories else None
                    memory = None if call is None else state.memories[call]
                    if state.keep_counts is not None and site.slot not in counts:
                        counts[site.slot] = self._read(match, state.keep_counts, site.slot)
                    row = self._rewrite(match, counts.get(site.slot), site.slot, memory)
                    if row is not None:
                        # If a layer is called several times, the last call in the backward counts.
                        rows[site.slot] = row
            self.sites.append(site)
        if rows:
            assert state.table is not None
            self._write(graph, state.table, rows)
        left = Counter(site.reason for site in self.sites if site.reason)
        return PassSummary(len(self.sites), len(self.sites) - left.total(), left)

    def _judge(self, match: SiteMatch, site: Site) -> Site:
        """Return a site with the final decision whether it becomes sparse, and its times."""
        if self.selection.memory and _memory_maybe(match) is None:
            reason = "no convolution or linear call gives its output, so it has no memory"
            return replace(site, slot=-1, sparse_flops=0, reason=reason)
        if self.gate is None:
            return site
        times = self.gate.times(match, site.slot, self.selection)
        if reason := why_slower(times, site.channels):
            return replace(site, slot=-1, sparse_flops=0, reason=reason, times=times)
        return replace(site, times=times)

    def _read(self, match: SiteMatch, keep_counts: fx.Node, slot: int) -> fx.Node:
        """Read a slot's keep count, in blocks, before the first site of the slot.

        All sites of a slot share one read: torch would merge two reads, and know nothing about the
        second one's symbol.
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
        memory: fx.Node | None,
    ) -> fx.Node | None:
        """Replace a site with its sparse backward; return its row of the table, if it has one."""
        operands = len(match.inputs)
        state = [node for node in (memory, count) if node is not None]
        inputs = [*match.inputs, *state]
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
            remembered = None if memory is None else tensors[operands]
            gradients = match.backward(k, selection, *tensors[:operands], memory=remembered)
            # Views that follow in the graph may need the layout of the dense gradient.
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
        """Write the sites' rows, by slot, into the table at the end of the graph."""
        positions = {slot: i for i, slot in enumerate(rows)}

        def write(table: Tensor, *rows: Tensor) -> tuple[()]:
            write_rows(table, rows, positions)
            return ()

        self._replacer.insert(graph.output_node(), write, [table, *rows.values()])


def _memory_maybe(match: SiteMatch) -> Any:
    """Return the index of a site's call among the calls with memories, None if it has none."""
    return (match.node.meta.get("custom") or {}).get(MEMORY_KEY)
