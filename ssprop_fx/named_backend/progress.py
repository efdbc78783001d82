"""Progress: what the log says about a run under the no-edit backend.

A script that was not edited prints nothing of its own about sparse steps. So these lines are shown
by default; `SSPROP_LOG=warning` silences them:

    Net: steps 0 to 999: dense; from step 1000: drop rate 0.8
    Net: all steps: 1000 of 2000 sparse, mean drop rate 0.4, 31.6% of the backward's FLOPs saved
"""

import atexit
import logging
import os

from torch import distributed

from ssprop_fx.logs import show_by_default
from ssprop_fx.runtime.sparse_variant import SparseVariant

__all__ = ["Progress"]

logger = logging.getLogger(__name__)

# A schedule that alternates step by step would fill the log. After so many lines, a phase needs so
# many steps to get one.
_LINES = 4
_LONG = 50


class _Steps:
    """Sums over the steps of a phase, or of a run."""

    def __init__(self) -> None:
        self.count = 0
        self.sparse = 0
        self.rates = 0.0
        self.saved = 0.0

    def __str__(self) -> str:
        if not self.rates and not self.sparse:
            return "dense"
        return (
            f"{self.sparse} of {self.count} sparse, mean drop rate {self.rates / self.count:.3g},"
            f" {self.saved / self.count:.1%} of the backward's FLOPs saved"
        )


class Progress:
    """Counts the steps of a model; logs a line when a phase ends, and one when the process ends.

    Args:
        name: of the model.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._all, self._phase = _Steps(), _Steps()
        self._lines = 0
        self._was_dense = True
        self._shares: dict[object, float] = {}
        # All ranks of a distributed run take the same steps.
        self._is_shown = _rank() == 0
        show_by_default(logger)
        atexit.register(self.end)

    def end_step(self, variant: SparseVariant) -> None:
        """Count a step that ends now.

        Args:
            variant: the model's sparse variant; its keep counts are those of this step.
        """
        is_sparse = any(graph.is_sparse for graph in variant.tripwire.ran)
        for steps in (self._all, self._phase):
            steps.count += 1
            steps.sparse += is_sparse
            steps.rates += _drop_rate(variant)
            steps.saved += self._saved_share(variant) if is_sparse else 0.0
        self._was_dense = variant.scheduler.drop_rate == 0

    def begin_step(self, variant: SparseVariant) -> None:
        """Log the phase that has ended, if a step of another one begins now."""
        scheduler = variant.scheduler
        if self._was_dense == (scheduler.drop_rate == 0):
            return
        phase, self._phase = self._phase, _Steps()
        if self._lines < _LINES or phase.count >= _LONG:
            self._lines += 1
            begun = "dense" if not scheduler.drop_rate else f"drop rate {scheduler.drop_rate:g}"
            if scheduler.drop_rate and scheduler.controller is not None:
                begun = "sparse"
            step = scheduler.last_step
            steps = f"steps {step - phase.count} to {step - 1}"
            self._log(f"{steps}: {phase}; from step {step}: {begun}")

    def end(self) -> None:
        """Log the sums over all steps, once."""
        if self._all.count:
            self._log(f"all steps: {self._all}")
        self._all = _Steps()

    def _log(self, line: str) -> None:
        if self._is_shown:
            logger.info("%s: %s", self._name, line)

    def _saved_share(self, variant: SparseVariant) -> float:
        """Return the share of the backward's FLOPs that the keep counts in force save."""
        keep_counts, samples = variant.keep_counts.tolist(), variant.kept_samples
        key = tuple(keep_counts), len(variant.backend.graphs), samples
        if key not in self._shares:
            graphs = variant.graphs
            sites = [site for graph in graphs for site in graph.sites if not site.reason]
            saved = sum(site.saved_flops(keep_counts[site.slot] * site.groups) for site in sites)
            left = 1 - saved / max(sum(graph.total_flops for graph in graphs), 1)
            kept, size = samples or (1, 1)
            # Controllers and rules may decide differently in each step.
            self._shares = {key: 1 - left * kept / size}
        return self._shares[key]


def _drop_rate(variant: SparseVariant) -> float:
    """Return the drop rate of a step: the schedule's, or what a controller has made of it."""
    rate: float = variant.scheduler.drop_rate
    counts = variant.counts
    if rate == 0 or variant.scheduler.controller is None:
        return rate
    if (samples := variant.kept_samples) is not None:
        return 1 - samples[0] / samples[1]
    channels = [c // g for c, g in zip(counts.channels, counts.groups, strict=True)]
    return 1 - int(variant.keep_counts.sum()) / max(sum(channels), 1)


def _rank() -> int:
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
