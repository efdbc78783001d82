"""SparseVariant: a model's sparse form, and the decision when to run it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from ssprop_passes.sites.site import Slot
from torch import nn
from torch.utils._pytree import tree_leaves

from ssprop_fx.compiler.backend import SparseBackend
from ssprop_fx.compiler.backward_state import Memory
from ssprop_fx.compiler.site_cache import GraphRecord
from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.config import SparsityConfig
from ssprop_fx.runtime.rank_agreement import RankAgreement
from ssprop_fx.runtime.tripwire import Problem, Tripwire, why_no_layer
from ssprop_fx.runtime.user_warning import warn_no_effect
from ssprop_fx.scheduling.keep_counts import KeepCounts
from ssprop_fx.scheduling.sample_rules import SampleRule, SampleTelemetry
from ssprop_fx.scheduling.scheduler import SparsityScheduler
from ssprop_fx.scheduling.telemetry import SiteTelemetry

__all__ = ["SparseVariant", "saved_share"]

# Share of its layers' dense time that a sparse step must save by the gate's times. Those do not
# include top-k, scatters and the code around them, which cost more than is saved at low drop rates.
_SMALLEST_GAIN = 0.1


class SparseVariant:
    """A model's sparse variant: its layers, their keep counts, and the decision when to run it.

    Args:
        model: the model; this does not keep it alive.
        scheduler: sets the drop rate.
        config: which layers take part.
        kind: `"inductor"` or `"aot_eager"`.
        options: Inductor configuration patches; empty for AOT eager.
        counts: the part of the runtime sparsity tensor to use if the model is a copy. By
            default a new part is registered with the scheduler.
        memory: what the sparse backwards have left out so far; empty by default.

    Attributes:
        backend: the backend that compiles the sparse graphs; the last one used if there are
            several.

    Raises:
        ValueError: the model has layers whose weights do not exist yet.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: SparsityScheduler,
        config: SparsityConfig,
        kind: str,
        options: dict[str, Any],
        counts: KeepCounts | None = None,
        memory: Memory | None = None,
    ) -> None:
        chooses_samples = config.axis == "sample"
        if scheduler.controller is not None and not chooses_samples:
            # A controller decides from telemetry.
            config = replace(config, telemetry=True)
        if chooses_samples:
            _check_select(config, scheduler)
        self.scheduler = scheduler
        self.config = config
        self.table = find_slots(model, config)
        slots = self.table.slots
        # The last slot of a model whose samples are chosen counts samples.
        of_batch = [Slot(len(slots), "samples", 1)] if chooses_samples else []
        self.counts = counts or scheduler.register(
            [slot.channels for slot in (*slots, *of_batch)],
            config.channel_multiple,
            [slot.groups for slot in (*slots, *of_batch)],
            [self.table.rates.get(slot.name) for slot in slots] + [None for _ in of_batch],
            config.block,
            [slot.name for slot in (*slots, *of_batch)],
            chooses_samples,
        )
        self.memory = memory or Memory([s.name for s in slots] if config.memory else ())
        self.backend = SparseBackend(
            model, config, self.table, self.counts, self.memory, kind, options
        )
        self._agreement: RankAgreement | None = None
        if config.ranks == "shared":
            what = repr((slots, config.selection.identity))
            self._agreement = RankAgreement(scheduler, self.counts, what, self._device)
        self.tripwire = Tripwire(self.backend)
        self._warned: set[str] = set()
        self._judged: tuple[float, int] | None = None
        self._faster = True
        if not self.takes_part:
            self._warn(why_no_layer(self.table.excluded))

    @property
    def takes_part(self) -> bool:
        """Whether anything of the model can be sparse."""
        return bool(self.table.slots) or self.config.axis == "sample"

    @property
    def keep_counts(self) -> torch.Tensor:
        """The model's part of the runtime sparsity tensor: int64, CPU, [slots]."""
        return self.counts.tensor

    @property
    def kept_samples(self) -> tuple[int, int] | None:
        """How many samples a backward keeps now, of how many in the last batch.

        With a rule, how many the last backward kept. None unless all compiled graphs run on the
        kept samples.
        """
        graphs = self.graphs
        if not graphs or not all(graph.is_sliced for graph in graphs):
            return None
        if self.counts.rule is not None:
            kept = self.counts.samples
            return None if kept is None else (len(kept.indices), len(kept.scores))
        return int(self.keep_counts[-1]), self.counts.channels[-1]

    @property
    def samples(self) -> SampleTelemetry | None:
        """What the last backward kept of its batch; None if it was whole. Waits for a GPU."""
        kept = self.counts.samples
        return None if kept is None else kept.telemetry()

    def telemetry(self) -> dict[str, SiteTelemetry]:
        """Return the telemetry of each layer; see `SparsityScheduler.telemetry`."""
        return self.counts.telemetry.latest()

    @property
    def graphs(self) -> tuple[GraphRecord, ...]:
        """Records of the sparse variant's compiled graphs, the newest for each group of layers."""
        newest = {tuple(site.name for site in graph.sites): graph for graph in self.backend.graphs}
        return tuple(newest.values())

    def agree(self) -> None:
        """Compare the ranks' keep counts before a training forward with a shared selection.

        Raises:
            RuntimeError: they differ, or the sparse graphs are older than the process group.
        """
        if self._agreement and self.backend.model.training and torch.is_grad_enabled():
            self._agreement.check(self.backend.ranks)

    def is_due(self) -> bool:
        """Return whether scheduler, the model's mode, autograd and gate ask for a sparse step."""
        return (
            self.scheduler.drop_rate > 0
            and self.backend.model.training
            and torch.is_grad_enabled()
            and self.takes_part
            and self._is_faster_sparse()
        )

    @property
    def why_whole_steps_are_dense(self) -> str:
        """Why the gate runs whole steps dense at the drop rate in force, "" if it does not."""
        if self.scheduler.drop_rate == 0 or self._is_faster_sparse():
            return ""
        return "the gate runs whole steps dense at this drop rate: they would not be faster sparse"

    def _is_faster_sparse(self) -> bool:
        """Return whether the gate's times predict a gain at the drop rate in force."""
        state = self.scheduler.drop_rate, len(self.backend.graphs)
        if state != self._judged:
            self._judged = state
            saved = saved_share(self.graphs, self.keep_counts.tolist())
            self._faster = saved is None or saved > _SMALLEST_GAIN
            if not self._faster:
                message = (
                    f"at drop rate {state[0]:g} the sparse backward of the model's layers would"
                    f" save {cast(float, saved):.0%} of the dense backward's time, less than the"
                    f" sparse step's extra cost ({_SMALLEST_GAIN:.0%}), so the step runs dense;"
                    " SparsityConfig(gate=False) makes it sparse anyway"
                )
                self._warn(Problem("slower", message))
        return self._faster

    def _device(self) -> torch.device:
        parameter = next(self.backend.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def check_step(self) -> None:
        """Warn if a sparse step that ends now was not sparse in every layer.

        Each problem gives one warning. A dense step warns again after a step without problems.
        """
        problems = self.tripwire.problems()
        if not problems:
            self._warned.discard("dense")
        for problem in problems:
            self._warn(problem)

    def watch(self, output: Any) -> None:
        """Warn if a backward follows from a forward that ran dense only because of eval mode.

        Args:
            output: what the forward returned.
        """
        if (
            self.scheduler.drop_rate == 0
            or self.backend.model.training
            or not torch.is_grad_enabled()
            or not self.takes_part
            or "eval" in self._warned
        ):
            return
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(self._warn_of_eval)  # type: ignore[no-untyped-call]
                return

    def _warn_of_eval(self, _gradient: torch.Tensor) -> None:
        message = (
            "the model is in eval() mode, so this backward was dense although the drop rate is"
            f" {self.scheduler.drop_rate:g}: call model.train() to train sparse, and then eval() on"
            " single layers such as batch norms; if a dense backward is what you want, use"
            " scheduler.dense()"
        )
        self._warn(Problem("eval", message))

    def _warn(self, problem: Problem) -> None:
        if problem.kind not in self._warned:
            self._warned.add(problem.kind)
            warn_no_effect(problem.message)


def _check_select(config: SparsityConfig, scheduler: SparsityScheduler) -> None:
    """Raise a ValueError if the rule draws samples by itself, and the configuration says how."""
    rule = scheduler.controller
    draws = isinstance(rule, SampleRule) and rule.select is not None
    if draws and config.select not in (SparsityConfig.select, "sampled"):
        raise ValueError(
            f'select must be "sampled", or left out, with {rule!r}, which draws samples by itself;'
            f" got {config.select!r}"
        )


def saved_share(graphs: Sequence[GraphRecord], keep_counts: Sequence[int]) -> float | None:
    """Return the share of their dense time that sparse sites save; None if any is not measured.

    Args:
        graphs: records of the compiled graphs.
        keep_counts: keep count of each slot.
    """
    sites = [site for graph in graphs for site in graph.sites if not site.reason]
    if not sites or any(site.times is None for site in sites):
        return None
    saved = sum(cast(float, s.saved_ms(keep_counts[s.slot] * s.groups)) for s in sites)
    return saved / sum(site.times.dense for site in sites if site.times)
