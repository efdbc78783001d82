"""RankAgreement: ranks that share a selection must be about to take the same step.

Otherwise one of them would wait for another in a collective that the other never calls, or worse,
take part in a different one.
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

    That is one all-reduce of six numbers. Only a rank whose keep counts have changed waits for its
    result: ranks that disagree have not done so before, so one of them has changed.

    Args:
        scheduler: moves the drop rate.
        keep_counts: the model's part of the runtime sparsity tensor.
        layers: what else must be equal on all ranks, as a text.
        device: returns the device that the model is on.
    """

    def __init__(
        self,
        scheduler: SparsityScheduler,
        keep_counts: KeepCounts,
        layers: str,
        device: Callable[[], torch.device],
    ) -> None:
        self._scheduler = scheduler
        self._keep_counts = keep_counts
        self._layers = layers
        self._device = device
        self._agreed: list[int] | None = None

    def check(self, compiled_for: Collection[Ranks | None]) -> None:
        """Take part in the comparison; all ranks must call this equally often.

        Args:
            compiled_for: the ranks that the model's graphs share their selection with.

        Raises:
            RuntimeError: the ranks disagree, or are not those of the graphs.
        """
        ranks = find_ranks_maybe()
        if set(compiled_for) - {ranks}:
            before = ", ".join(sorted(map(_in_words, compiled_for)))
            raise RuntimeError(
                f"the model was first run in a sparse step with {before}, and runs with"
                f' {_in_words(ranks)} now, but SparsityConfig(ranks="shared") is compiled for the'
                " ranks that there are: call init_process_group before the first training step, or"
                " ssprop_compile again after it"
            )
        if ranks is None:
            return
        counts = self._keep_counts.tensor.tolist()
        step, rate = self._scheduler.last_step, self._scheduler.drop_rate
        digest = hashlib.sha256(repr((counts, self._layers)).encode()).digest()
        # As many bits as float64 holds exactly.
        state = [float(int.from_bytes(digest[:6])), float(step), rate]
        # On NCCL a collective takes a tensor of the rank's device. Under DistributedDataParallel,
        # Dynamo may be the caller, with fake tensors.
        with outside_modes():
            bounds = torch.tensor([*state, *(-value for value in state)], dtype=torch.float64)
            bounds = bounds.to(self._device())
            work = distributed.all_reduce(bounds, distributed.ReduceOp.MAX, async_op=True)
            if counts == self._agreed:
                return
            work.wait()
            largest = bounds[:3].tolist()
            smallest = [-value for value in bounds[3:].tolist()]
        if largest[0] != smallest[0]:
            raise RuntimeError(
                'the ranks do not agree on this step, which SparsityConfig(ranks="shared") needs:'
                f" this one is at step {step} of its schedule, drop rate {rate:g}; over all ranks"
                f" steps are from {smallest[1]:.0f} to {largest[1]:.0f} and drop rates from"
                f" {smallest[2]:g} to {largest[2]:g}. Give all of them the same model, config and"
                " schedule, and call scheduler.step() on all or none"
            )
        self._agreed = counts


def _in_words(ranks: Ranks | None) -> str:
    return f"{ranks.size} ranks in group {ranks.group!r}" if ranks else "no other rank"
