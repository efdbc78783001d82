"""SsPropModule: a model and its two compiled variants, dispatched at each call."""

import copy
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

__all__ = ["SsPropModule"]


class SsPropModule(nn.Module):
    """What `ssprop_compile` returns: stands for the model, as `torch.compile`'s module does.

    Two variants are compiled when first needed. Dense is plain `torch.compile`; sparse is the
    rewritten graph. The choice is made outside `torch.compile` at each call, so that a dense phase
    costs nothing. Parameters, buffers and attributes are those of the model itself.
    """

    # Attributes of this module itself; all others are read from and written to the model.
    _own = frozenset(
        {"_orig_mod", "scheduler", "config", "training", "_compile_kwargs", "_table"}
        | {"_keep_counts", "_backend", "_dense", "_sparse", "_warned"}
    )

    def __init__(
        self,
        model: nn.Module,
        scheduler: SparsityScheduler,
        config: SparsityConfig,
        compile_kwargs: dict[str, Any],
        keep_counts: KeepCounts | None = None,
    ) -> None:
        super().__init__()
        self._orig_mod = model
        self.scheduler = scheduler
        self.config = config
        self._compile_kwargs = compile_kwargs
        self._table = find_slots(model, config)
        channels = [slot.channels // slot.groups for slot in self._table.slots]
        self._keep_counts = keep_counts or scheduler.register(channels, self._multiple())
        self._backend = SparseBackend(
            self._table, self._keep_counts, compile_kwargs["backend"], self._inductor_options()
        )
        # Not `self._dense = ...`: a submodule would put every parameter into the state twice.
        self.__dict__["_dense"] = torch.compile(model, **compile_kwargs)
        self.__dict__["_sparse"] = torch.compile(
            model,
            backend=self._backend,
            fullgraph=compile_kwargs["fullgraph"],
            dynamic=compile_kwargs["dynamic"],
        )
        self._warned = False
        if not channels:
            self._warn_no_effect(_no_layer(self._table.excluded))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the variant that the scheduler, the mode and autograd's state call for."""
        is_sparse = (
            self.scheduler.drop_rate > 0
            and self._orig_mod.training
            and torch.is_grad_enabled()
            and self._table.slots
        )
        return self._run_sparse(*args, **kwargs) if is_sparse else self._dense(*args, **kwargs)

    @property
    def keep_counts(self) -> torch.Tensor:
        """The model's part of the runtime sparsity tensor: int64, CPU, [slots]."""
        return self._keep_counts.tensor

    @property
    def compiled_graphs(self) -> tuple[CompiledGraph, ...]:
        """The graphs of the sparse variant, the newest of each group of layers."""
        newest = {tuple(site.name for site in graph.sites): graph for graph in self._backend.graphs}
        return tuple(newest.values())

    def _run_sparse(self, *args: Any, **kwargs: Any) -> Any:
        backend = self._backend
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
            self._warn_no_effect(problem)
        return output

    def _warn_no_effect(self, message: str) -> None:
        self._warned = True
        warnings.warn(message, NoEffectWarning, stacklevel=2)

    def _multiple(self) -> int:
        parameter = next(self._orig_mod.parameters(), None)
        device_type = "cpu" if parameter is None else parameter.device.type
        return resolve_multiple(self.config.channel_multiple, device_type)

    def _inductor_options(self) -> dict[str, Any]:
        mode, options = self._compile_kwargs.get("mode"), self._compile_kwargs.get("options")
        if mode is not None:
            return dict(list_mode_options(mode, self._compile_kwargs["dynamic"]))
        return {key.replace("-", "_"): value for key, value in (options or {}).items()}

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return "_orig_mod" not in self.__dict__["_modules"] or self._orig_mod.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_modules" in self.__dict__ and "_orig_mod" in self._modules:
            self._orig_mod.training = mode

    def _apply(self, fn: Any, recurse: bool = True) -> "SsPropModule":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # The model may have moved to another device.
        self._keep_counts.multiple = self._multiple()
        self.scheduler.refresh()
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "_orig_mod":
            return self.__dict__["_modules"]["_orig_mod"]
        return getattr(self._orig_mod, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            super().__setattr__(name, value)
        else:
            setattr(self._orig_mod, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._orig_mod, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SsPropModule":
        # The copy follows the same scheduler, in the same slots: its layers are the same.
        model = copy.deepcopy(self._orig_mod, memo)
        return type(self)(
            model, self.scheduler, self.config, self._compile_kwargs, self._keep_counts
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self._orig_mod, self.scheduler, self.config, self._compile_kwargs)
        return type(self), (*arguments, self._keep_counts)


def _no_layer(excluded: dict[str, str]) -> str:
    reasons = sorted(set(excluded.values())) or ["it has no convolution"]
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
    reasons = sorted({site.reason for site in sites}) or ["it has no convolution backward"]
    return f"no site of the model was made sparse, so it trains dense: {'; '.join(reasons)}."
