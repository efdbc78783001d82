"""Variants: a model's two compiled forms, dense and sparse, and the choice between them."""

import warnings
from typing import Any

import torch
from ssprop_passes.errors import NoEffectWarning
from torch import nn
from torch._inductor import list_mode_options

from ssprop_fx.backend import SparseBackend
from ssprop_fx.config import SparsityConfig
from ssprop_fx.records import CompiledGraph
from ssprop_fx.scheduler import KeepCounts, SparsityScheduler
from ssprop_fx.slots import find_slots, resolve_multiple

__all__ = ["Variants"]


class Variants:
    """A model's dense and sparse variant, each compiled when first needed.

    Dense is plain `torch.compile`, sparse the rewritten graph. The choice is made outside
    `torch.compile` at each call, so that a dense phase costs nothing.

    Args:
        model: the model.
        scheduler: moves the drop rate.
        config: which layers take part.
        compile_kwargs: arguments of `torch.compile`: backend, fullgraph, dynamic and, for
            Inductor, mode and options.
        keep_counts: the part of the runtime sparsity tensor to use, where the model is the copy
            of another; by default a new part is registered with the scheduler.

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
    ) -> None:
        self.model = model
        self.scheduler = scheduler
        self.config = config
        self.compile_kwargs = compile_kwargs
        self.table = find_slots(model, config)
        slots = self.table.slots
        self.part = keep_counts or scheduler.register(
            [slot.channels for slot in slots], self._multiple(), [slot.groups for slot in slots]
        )
        self.backend = SparseBackend(
            model, config, self.table, self.part, compile_kwargs["backend"], self._options()
        )
        self._dense = torch.compile(model, **compile_kwargs)
        self._sparse = torch.compile(
            model,
            backend=self.backend,
            fullgraph=compile_kwargs["fullgraph"],
            dynamic=compile_kwargs["dynamic"],
        )
        self._warned = False
        if not slots:
            self._warn(_why_no_layer(self.table.excluded), stacklevel=5)

    @property
    def keep_counts(self) -> torch.Tensor:
        """The model's part of the runtime sparsity tensor: int64, CPU, [slots]."""
        return self.part.tensor

    @property
    def graphs(self) -> tuple[CompiledGraph, ...]:
        """The compiled graphs of the sparse variant, the newest of each group of layers."""
        newest = {tuple(site.name for site in graph.sites): graph for graph in self.backend.graphs}
        return tuple(newest.values())

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the variant that the scheduler, the model's mode and autograd's state ask for."""
        is_sparse = (
            self.scheduler.drop_rate > 0
            and self.model.training
            and torch.is_grad_enabled()
            and self.table.slots
        )
        return self._run_sparse(*args, **kwargs) if is_sparse else self._dense(*args, **kwargs)

    def follow_device(self) -> None:
        """Round keep counts for the device that the model is on now."""
        self.part.multiple = self._multiple()
        self.scheduler.refresh()

    def _run_sparse(self, *args: Any, **kwargs: Any) -> Any:
        backend = self.backend
        backend.error = None
        runs_before = backend.sparse_runs
        try:
            output = self._sparse(*args, **kwargs)
        except Exception:
            # Dynamo wraps what its backend raises; the user gets our error and its cause.
            if backend.error is not None:
                raise backend.error from backend.error.__cause__
            raise
        if backend.error is not None:
            # Dynamo swallowed it and ran eager, as with `suppress_errors`.
            raise backend.error from backend.error.__cause__
        if not self._warned and (problem := _why_no_effect(backend, runs_before)):
            self._warn(problem, stacklevel=7)
        return output

    def _warn(self, message: str, stacklevel: int) -> None:
        self._warned = True
        warnings.warn(message, NoEffectWarning, stacklevel=stacklevel)

    def _multiple(self) -> int:
        parameter = next(self.model.parameters(), None)
        device_type = "cpu" if parameter is None else parameter.device.type
        return resolve_multiple(self.config.channel_multiple, device_type)

    def _options(self) -> dict[str, Any]:
        mode, options = self.compile_kwargs.get("mode"), self.compile_kwargs.get("options")
        if mode is not None:
            return dict(list_mode_options(mode, self.compile_kwargs["dynamic"]))
        return {key.replace("-", "_"): value for key, value in (options or {}).items()}


def _why_no_layer(excluded: dict[str, str]) -> str:
    reasons = sorted(set(excluded.values())) or ["it has no convolution and no linear layer"]
    return (
        "no layer of the model takes part in sparse back-propagation, so it trains dense:"
        f" {'; '.join(reasons)}. See SparsityConfig(min_channels=..., filter_fn=...)."
    )


def _why_no_effect(backend: SparseBackend, runs_before: int) -> str:
    """Return what is wrong with a sparse step that has just run, "" if nothing is."""
    if backend.sparse_runs > runs_before:
        missing = [s.name for s in backend.table.slots if s.name not in backend.captured]
        if not missing:
            return ""
        return (
            f"{len(missing)} layers are in no compiled graph and train dense: {', '.join(missing)}."
            " Either the model does not use them, or Dynamo runs them eagerly: see"
            " TORCH_LOGS=graph_breaks, and fullgraph=True to forbid it."
        )
    sites = [site for graph in backend.graphs for site in graph.sites]
    if not backend.graphs or any(not site.reason for site in sites):
        return (
            "the drop rate is above 0, but no sparse graph ran, so this step trained dense. Likely"
            " causes: Dynamo's recompile limit was hit (see torch._dynamo.config.recompile_limit;"
            " drop_last=True avoids the recompile of a short last batch), compilation is disabled"
            " (torch.compiler.set_stance, TORCHDYNAMO_DISABLE), or an active dispatch mode, such"
            " as FlopCounterMode, makes Dynamo run eagerly."
        )
    reasons = sorted({site.reason for site in sites}) or ["it has no backward"]
    return f"no site of the model was made sparse, so it trains dense: {'; '.join(reasons)}."
