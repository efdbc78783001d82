"""RankAgreement: checks that ranks that share a selection are about to take the same step.

Otherwise a rank would wait in a collective that another never calls or, worse, both would meet in
different collectives.
"""

import hashlib
from collections.abc import Callable, Collection

import torch
from ssprop_passes.graph.modes import outside_modes
from ssprop_passes.selection.ranks import Ranks, find_ranks_maybe
from torch import distributed

from ssprop_fx.scheduling.keep_counts import KeepCounts
from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["RankAgreement"]


class RankAgreement:
    """Compares the keep counts of all ranks at every training forward.

    The comparison is one all-reduce of six numbers. Only a rank whose keep counts have changed
    waits for the result: if ranks that agreed before disagree now, one of them has changed.

    Args:
        scheduler: sets the drop rate.
        counts: the model's part of the runtime sparsity tensor.
        layers: a text that identifies everything else that must be equal on all ranks.
        device: returns the device that the model is on.
    """

    def __init__(
        self,
        scheduler: SparsityScheduler,
        counts: KeepCounts,
        layers: str,
        device: Callable[[], torch.device],
    ) -> None:
        self._scheduler = scheduler
        self._counts = counts
        self._layers = layers
        self._device = device
        self._agreed: list[int] | None = None

    def check(self, compiled_for: Collection[Ranks | None]) -> None:
        """Take part in the comparison; all ranks must call this equally often.

        Args:
            compiled_for: the ranks that the model's graphs share their selection with.

        Raises:
            RuntimeError: the ranks disagree, or the graphs were compiled for other ranks.
        """
        ranks = find_ranks_maybe()
        if set(compiled_for) - {ranks}:
            before = ", ".join(sorted(map(_in_words, compiled_for)))
            raise RuntimeError(
                f"the model was first run in a sparse step with {before}, and runs with"
                f' {_in_words(ranks)} now, but SparsityConfig(ranks="shared") compiles for the'
                " ranks at that time: call init_process_group before the first training step, or"
                " call ssprop_compile again after init_process_group"
            )
        if ranks is None:
            return
        keep_counts = self._counts.tensor.tolist()
        step, rate = self._scheduler.last_step, self._scheduler.drop_rate
        digest = hashlib.sha256(repr((keep_counts, self._layers)).encode()).digest()
        # As many bits as float64 holds exactly.
        state = [float(int.from_bytes(digest[:6])), float(step), rate]
        # NCCL collectives need a tensor on the rank's device. Under DistributedDataParallel, Dynamo
        # may be the caller, with fake tensors.
        with outside_modes():
            bounds = torch.tensor([*state, *(-value for value in state)], dtype=torch.float64)
            bounds = bounds.to(self._device())
            work = distributed.all_reduce(bounds, distributed.ReduceOp.MAX, async_op=True)
            if keep_counts == self._agreed:
                return
            work.wait()
            largest = bounds[:3].tolist()
            smallest = [-value for value in bounds[3:].tolist()]
        if largest[0] != smallest[0]:
            raise RuntimeError(
                'SparsityConfig(ranks="shared") needs all ranks to take the same step, but they'
                f" differ: this one is at step {step} of its schedule, drop rate {rate:g}; over all"
                f" ranks steps are from {smallest[1]:.0f} to {largest[1]:.0f} and drop rates from"
                f" {smallest[2]:g} to {largest[2]:g}. Give all ranks the same model, config and"
                " schedule, and call scheduler.step() on all ranks or on none"
            )
        self._agreed = keep_counts


def _in_words(ranks: Ranks | None) -> str:
    return f"{ranks.size} ranks in group {ranks.group!r}" if ranks else "no other rank"
