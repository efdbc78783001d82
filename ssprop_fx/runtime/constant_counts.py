"""Specialization: which keep counts are compiled in as constants.

A schedule such as `bar` has one drop rate above 0. If its keep counts are plain ints, Inductor
knows every size, and the graph has no input on the CPU, as CUDA graphs require. The price is one
compile for each drop rate.
"""

from typing import Literal

from torch import nn

from ssprop_fx.compiler.slots import SlotTable, own_weight_maybe
from ssprop_fx.scheduling.keep_counts import KeepCounts

__all__ = ["AUTO_LEVELS", "MAX_LEVELS", "constant_levels"]

# "auto" specializes schedules with at most this many drop rates above 0. Each costs a compile.
AUTO_LEVELS = 2

# Dense and sparse forms of every batch size share Dynamo's recompile limit of 8.
MAX_LEVELS = 6


def constant_levels(
    specialize: bool | Literal["auto"],
    counts: KeepCounts,
    model: nn.Module,
    table: SlotTable,
    fullgraph: bool,
) -> frozenset[tuple[int, ...]]:
    """Return the keep counts to compile in as constants: a tuple per drop rate, a count per slot.

    Args:
        specialize: as in `SparsityConfig`.
        counts: the model's part of the runtime sparsity tensor.
        model: the model.
        table: its slots.
        fullgraph: whether the model is one graph, as in `torch.compile`.

    Raises:
        ValueError: `specialize` is True, and the schedule has too many drop rates.
    """
    levels = counts.levels
    if specialize is True:
        if levels is None or len(levels) > MAX_LEVELS:
            raise ValueError(
                f"specialize=True compiles once for each drop rate of the schedule, at most"
                f" {MAX_LEVELS}, and this one has {'too many' if levels is None else len(levels)}:"
                ' use specialize="auto" or False'
            )
        return levels
    if not specialize or levels is None or len(levels) > AUTO_LEVELS:
        return frozenset()
    return levels if fullgraph or is_uniform(model, table) else frozenset()


def is_uniform(model: nn.Module, table: SlotTable) -> bool:
    """Return whether all layers with the same weight shape have the same drop rate.

    After a graph break Dynamo may run the graph compiled for one such layer for another as well.
    """
    slots = {slot.name for slot in table.slots}
    rates: dict[object, object] = {}
    for name, module in model.named_modules():
        if (weight := own_weight_maybe(module)) is not None and weight.ndim > 1:
            rate = table.rates.get(name) if name in slots else "dense"
            if rates.setdefault(weight.shape, rate) != rate:
                return False
    return True
