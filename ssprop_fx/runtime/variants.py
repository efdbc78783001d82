"""Variants: a model's compiled forms, dense and sparse, and the choice between them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from ssprop_passes.errors import NoEffectWarning
from torch import nn
from torch._inductor import list_mode_options

from ssprop_fx.compiler.backend import SparseBackend
from ssprop_fx.compiler.backward_state import Memory
from ssprop_fx.compiler.site_cache import CompiledGraph
from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.config import SparsityConfig
from ssprop_fx.runtime.constant_counts import constant_levels
from ssprop_fx.runtime.rank_agreement import Agreement
from ssprop_fx.runtime.tripwire import Effect, Problem, why_no_layer
from ssprop_fx.scheduling.scheduler import KeepCounts, SparsityScheduler
from ssprop_fx.scheduling.telemetry import SiteTelemetry

__all__ = ["SparseVariant", "Variants", "inductor_options"]

# Share of its layers' dense time that a sparse step must save by the gate's times. These leave out
# top-k, scatters and the code around them, which at low drop rates cost more than is saved.
_SMALLEST_GAIN = 0.1


class SparseVariant:
    """A model's sparse variant: its layers, their keep counts, and when it is to run.

    Args:
        model: the model; it is not kept alive.
        scheduler: moves the drop rate.
        config: which layers take part.
        kind: `"inductor"` or `"aot_eager"`.
        options: Inductor configuration patches; empty for AOT eager.
        keep_counts: the part of the runtime sparsity tensor to use, where the model is the copy
            of another; by default a new part is registered with the scheduler.
        memory: what the sparse backwards remember; by default nothing.

    Attributes:
        backend: what compiles, and has compiled, the sparse graphs; of several the last one used.

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
        keep_counts: KeepCounts | None = None,
        memory: Memory | None = None,
    ) -> None:
        if scheduler.controller is not None:
            # Telemetry is what it goes by.
            config = replace(config, telemetry=True)
        self.scheduler = scheduler
        self.config = config
        self.table = find_slots(model, config)
        slots = self.table.slots
        self.part = keep_counts or scheduler.register(
            [slot.channels if config.axis == "channel" else 1 for slot in slots],
            _multiple(config),
            [slot.groups if config.axis == "channel" else 1 for slot in slots],
            [self.table.rates.get(slot.name) for slot in slots],
            config.block,
            [slot.name for slot in slots],
        )
        self.memory = memory or Memory([s.name for s in slots], config.selection.remembers)
        self.backend = SparseBackend(
            model, config, self.table, self.part, self.memory, kind, options
        )
        self._agreement: Agreement | None = None
        if config.ranks == "shared":
            what = repr((slots, config.selection.identity))
            self._agreement = Agreement(scheduler, self.part, what, self._device)
        self.effect = Effect(self.backend)
        self._warned: set[str] = set()
        self._judged: tuple[float, int] | None = None
        self._faster = True
        if not slots:
            self._warn(why_no_layer(self.table.excluded), stacklevel=6)

    @property
    def keep_counts(self) -> torch.Tensor:
        """The model's part of the runtime sparsity tensor: int64, CPU, [slots]."""
        return self.part.tensor

    def telemetry(self) -> dict[str, SiteTelemetry]:
        """Return what sparse backwards told of each layer; see `SparsityScheduler.telemetry`."""
        return self.part.telemetry.latest()

    @property
    def graphs(self) -> tuple[CompiledGraph, ...]:
        """The compiled graphs of the sparse variant, the newest of each group of layers."""
        newest = {tuple(site.name for site in graph.sites): graph for graph in self.backend.graphs}
        return tuple(newest.values())

    def agree(self) -> None:
        """Before a training forward with a shared selection, compare the ranks' keep counts.

        Raises:
            RuntimeError: they differ, or the process group came after the sparse graphs.
        """
        if self._agreement and self.backend.model.training and torch.is_grad_enabled():
            self._agreement.check(self.backend.ranks)

    def is_due(self) -> bool:
        """Say whether scheduler, mode of the model, autograd and gate ask for a sparse step."""
        return (
            self.scheduler.drop_rate > 0
            and self.backend.model.training
            and torch.is_grad_enabled()
            and bool(self.table.slots)
            and self._is_faster_sparse()
        )

    def _is_faster_sparse(self) -> bool:
        """Say whether the gate's times promise a gain at the drop rate in force."""
        state = self.scheduler.drop_rate, len(self.backend.graphs)
        if state != self._judged:
            self._judged = state
            saved = saved_share(self.graphs, self.keep_counts.tolist())
            self._faster = saved is None or saved > _SMALLEST_GAIN
            if not self._faster:
                message = (
                    f"at drop rate {state[0]:g} the sparse backward of the model's layers would"
                    f" save {cast(float, saved):.0%} of the dense one's time, less than what the"
                    f" sparse step costs beside ({_SMALLEST_GAIN:.0%}), so the step runs dense;"
                    " SparsityConfig(gate=False) makes it sparse all the same"
                )
                self._warn(Problem("slower", message), stacklevel=9)
        return self._faster

    def _device(self) -> torch.device:
        parameter = next(self.backend.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def check_effect(self, stacklevel: int) -> None:
        """Warn where a step that was due, and ends now, was not sparse in every layer.

        Once for each problem; that a whole step was dense, again when it happens again.

        Args:
            stacklevel: of the warning, as if the caller gave it.
        """
        problem = self.effect.problem_maybe()
        if problem is None:
            self._warned.discard("dense")
        else:
            self._warn(problem, stacklevel + 2)

    def _warn(self, problem: Problem, stacklevel: int) -> None:
        if problem.kind not in self._warned:
            self._warned.add(problem.kind)
            warnings.warn(problem.message, NoEffectWarning, stacklevel=stacklevel)


class Variants(SparseVariant):
    """A model's dense and sparse variant, each compiled when first needed.

    Dense is plain `torch.compile`, sparse the rewritten graph: one that reads its keep counts, and
    one for each of `constant_levels`. The choice is made outside
    `torch.compile` at each call, so that a dense phase costs nothing.

    Args:
        model: the model.
        scheduler: moves the drop rate.
        config: which layers take part.
        compile_kwargs: arguments of `torch.compile`: backend, fullgraph, dynamic and, for
            Inductor, mode and options.
        keep_counts, memory: as in `SparseVariant`.
        in_place: the model's own calls run the variants, which so must not call the model.

    Raises:
        ValueError: the model has layers whose weights do not exist yet.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: SparsityScheduler,
        config: SparsityConfig,
        compile_kwargs: dict[str, Any],
        keep_counts: KeepCounts | None = None,
        memory: Memory | None = None,
        in_place: bool = False,
    ) -> None:
        kind, mode = compile_kwargs["backend"], compile_kwargs.get("mode")
        options = inductor_options(mode, compile_kwargs.get("options"), compile_kwargs["dynamic"])
        super().__init__(model, scheduler, config, kind, options, keep_counts, memory)
        self.compile_kwargs = compile_kwargs
        self._called = _call_in_place(model) if in_place else model
        self._dense = self._compile(**compile_kwargs)
        self._sparse: dict[
            tuple[int, ...] | None, tuple[Callable[..., Any], SparseBackend, Effect]
        ] = {None: (self._compile_sparse(self.backend), self.backend, self.effect)}
        # Of samples the counts are those of a batch that is not known yet, and may change.
        specialize = config.specialize if config.axis == "channel" else False
        fullgraph = compile_kwargs["fullgraph"]
        self._levels = constant_levels(specialize, self.part, model, self.table, fullgraph)

    # Traced into another compiled function, the model would become part of that, and dense.
    @torch.compiler.disable(reason="ssprop_compile has compiled it already")  # type: ignore[no-untyped-call, untyped-decorator]
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the variant that the scheduler, the model's mode and autograd's state ask for."""
        self.agree()
        return (self._run_sparse if self.is_due() else self._dense)(*args, **kwargs)

    def _compile(self, **kwargs: Any) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(self._called, **kwargs)
        # Lightning, where imported, notes them on the model, whose copies would then hold them.
        vars(self.backend.model).pop("_compile_kwargs", None)
        return compiled

    def _compile_sparse(self, backend: SparseBackend) -> Callable[..., Any]:
        kwargs = {name: self.compile_kwargs[name] for name in ("fullgraph", "dynamic")}
        return self._compile(backend=backend, **kwargs)

    def _use_backend(self) -> Callable[..., Any]:
        """Let the backend for the keep counts in force be the current one; return its model."""
        counts = tuple(self.keep_counts.tolist())
        key = counts if counts in self._levels else None
        if key not in self._sparse:
            backend = self.backend.specialized(key)
            self._sparse[key] = self._compile_sparse(backend), backend, Effect(backend)
        compiled, self.backend, self.effect = self._sparse[key]
        return compiled

    def _run_sparse(self, *args: Any, **kwargs: Any) -> Any:
        sparse = self._use_backend()
        backend = self.backend
        backend.error = None
        self.effect.start()
        try:
            output = sparse(*args, **kwargs)
        except Exception:
            # Dynamo wraps what its backend raises; the user gets our error and its cause.
            if backend.error is not None:
                raise backend.error from backend.error.__cause__
            raise
        if backend.error is not None:
            # Dynamo swallowed it and ran eager, as with `suppress_errors`.
            raise backend.error from backend.error.__cause__
        self.check_effect(stacklevel=7)
        return output


def inductor_options(
    mode: str | None, options: dict[str, Any] | None, dynamic: bool | None = None
) -> dict[str, Any]:
    """Return the Inductor configuration patches that `torch.compile` arguments stand for."""
    if mode is not None:
        return dict(list_mode_options(mode, dynamic))
    return {key.replace("-", "_"): value for key, value in (options or {}).items()}


def _multiple(config: SparsityConfig) -> int | Literal["auto"]:
    is_of_samples = config.axis == "sample" and config.channel_multiple == "auto"
    return 1 if is_of_samples else config.channel_multiple


def saved_share(graphs: Sequence[CompiledGraph], keep_counts: Sequence[int]) -> float | None:
    """Return the share of their dense time that sparse sites save, None if some are not measured.

    Args:
        graphs: the compiled graphs.
        keep_counts: of each slot.
    """
    sites = [site for graph in graphs for site in graph.sites if not site.reason]
    if not sites or any(site.times is None for site in sites):
        return None
    saved = sum(cast(float, s.saved_ms(keep_counts[s.slot] * s.groups)) for s in sites)
    return saved / sum(site.times.dense for site in sites if site.times)


def _call_in_place(model: nn.Module) -> Callable[..., Any]:
    """Return what to compile in place of a model whose own calls run the compiled variants."""
    if not type(model).__module__.startswith("torch.nn."):
        return model._call_impl

    # Before torch 2.15 Dynamo looks for the model's `forward` below `_call_impl`, and skips that of
    # torch's own modules, such as Sequential, unless something else calls it.
    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return call
