"""Variants: a model's compiled forms, dense and sparse, and the choice between them."""

from collections.abc import Callable
from typing import Any

import torch
from ssprop_passes.graph.modes import is_traced, is_transformed
from torch import nn
from torch.utils._pytree import tree_leaves

from ssprop_fx.compiler.backend import SparseBackend
from ssprop_fx.compiler.backward_state import Memory
from ssprop_fx.compiler.batch_input import batch_marked
from ssprop_fx.compiler.inductor import inductor_options
from ssprop_fx.compiler.sample_choice import SampleChoice, opened
from ssprop_fx.config import SparsityConfig
from ssprop_fx.runtime.constant_counts import constant_levels
from ssprop_fx.runtime.sparse_variant import SparseVariant
from ssprop_fx.runtime.tripwire import Problem, Tripwire
from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["Variants"]

_TRANSFORMED = Problem(
    "transformed",
    "the model was called inside a transform of torch.func, such as grad or vmap, where compiled"
    " code does not run: it ran as it is, so gradients through this call are dense. For sparse ones"
    " call loss.backward() or torch.autograd.grad outside of such transforms.",
)


class Variants(SparseVariant):
    """A model's dense and sparse variants, each compiled when first needed.

    The dense variant is plain `torch.compile`. The sparse variant is the rewritten graph: one that
    reads keep counts, and one for each of `constant_levels`. Each call chooses a variant outside
    `torch.compile`, so a dense phase costs nothing.

    Args:
        model: the model.
        scheduler: sets the drop rate.
        config: which layers take part.
        compile_kwargs: arguments of `torch.compile`: backend, fullgraph, dynamic and, for
            Inductor, mode and options.
        in_place: calls of the model itself run the variants, so the variants must not call it.
        shared: `counts` and `memory` of `SparseVariant`, for a copy of a model.

    Raises:
        ValueError: the model has layers whose weights do not exist yet.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: SparsityScheduler,
        config: SparsityConfig,
        compile_kwargs: dict[str, Any],
        *,
        in_place: bool = False,
        **shared: Any,
    ) -> None:
        kind, mode = compile_kwargs["backend"], compile_kwargs.get("mode")
        options = inductor_options(mode, compile_kwargs.get("options"), compile_kwargs["dynamic"])
        super().__init__(model, scheduler, config, kind, options, **shared)
        self.compile_kwargs = compile_kwargs
        _release(model)
        self._called = _call_in_place(model) if in_place else model
        if in_place:
            # `nn.Module.compile` sets this too: `model(...)` calls it instead of `_call_impl`.
            model._compiled_call_impl = self.run
        self._dense = self._compile(**compile_kwargs)
        self._sparse: dict[
            tuple[int, ...] | None, tuple[Callable[..., Any], SparseBackend, Tripwire]
        ] = {None: (self._compile_sparse(self.backend), self.backend, self.tripwire)}
        # Keep counts of samples depend on the batch size, which is not known yet and may change.
        specialize = config.specialize if config.axis == "channel" else False
        fullgraph = compile_kwargs["fullgraph"]
        self._levels = constant_levels(specialize, self.counts, model, self.table, fullgraph)

    def for_copy(self, model: nn.Module, memory: Memory) -> "Variants":
        """Return the variants of a copy of the model, with the same scheduler, slots and settings.

        Args:
            model: the copy.
            memory: its memory.
        """
        return Variants(
            model,
            self.scheduler,
            self.config,
            self.compile_kwargs,
            counts=self.counts,
            memory=memory,
        )

    # If another compiled function traced this, the model would become part of it, and dense.
    @torch.compiler.disable(reason="ssprop_compile has compiled it already")  # type: ignore[no-untyped-call, untyped-decorator]
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the variant that the scheduler, the model's mode and autograd's state ask for.

        What traces or transforms the model gets the model as it is.
        """
        if is_traced(args):
            return self._called(*args, **kwargs)
        if is_transformed():
            if self.is_due():
                self._warn(_TRANSFORMED)
            return self._called(*args, **kwargs)
        self.agree()
        if self.is_due():
            return self._run_sparse(*args, **kwargs)
        output = self._dense(*args, **kwargs)
        self.watch(output)
        return output

    def _compile(self, **kwargs: Any) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(self._called, **kwargs)
        # Lightning, if imported, stores the arguments on the model; its copies would hold them.
        vars(self.backend.model).pop("_compile_kwargs", None)
        return compiled

    def _compile_sparse(self, backend: SparseBackend) -> Callable[..., Any]:
        kwargs = {name: self.compile_kwargs[name] for name in ("fullgraph", "dynamic")}
        return self._compile(backend=backend, **kwargs)

    def _use_backend(self) -> Callable[..., Any]:
        """Make the backend for the keep counts in force current; return its compiled model."""
        counts = tuple(self.keep_counts.tolist())
        key = counts if counts in self._levels else None
        if key not in self._sparse:
            backend = self.backend.specialized(key)
            self._sparse[key] = self._compile_sparse(backend), backend, Tripwire(backend)
        compiled, self.backend, self.tripwire = self._sparse[key]
        return compiled

    def _run_sparse(self, *args: Any, **kwargs: Any) -> Any:
        sparse = self._use_backend()
        backend = self.backend
        backend.error = None
        self.tripwire.start()
        try:
            if self.config.axis == "sample":
                output = self._run_sliced(sparse, *args, **kwargs)
            else:
                output = sparse(*args, **kwargs)
        except Exception:
            # Dynamo wraps errors of its backend; the user gets our error and its cause.
            if backend.error is not None:
                raise backend.error from backend.error.__cause__
            raise
        if backend.error is not None:
            # Dynamo swallowed the error and ran eagerly, as with `suppress_errors`.
            raise backend.error from backend.error.__cause__
        if _wants_gradients(output):
            self.check_step()
        return output

    def _run_sliced(self, sparse: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the sparse variant such that its backward begins with a choice of samples."""
        choice = SampleChoice(self.config.selection, self.counts)
        with opened(choice), batch_marked(tree_leaves((args, kwargs))):
            output = sparse(*args, **kwargs)
        return choice.attach(output)


def _release(model: nn.Module) -> None:
    """Let a model that was compiled in place before run as it is again.

    Raises:
        ValueError: `model.compile()` compiled it: what we compile would not be called.
    """
    compiled = getattr(model, "_compiled_call_impl", None)
    if compiled is None:
        return
    if not isinstance(getattr(compiled, "__self__", None), Variants):
        raise ValueError(
            "model must not be compiled already, but model.compile() was called on it: leave that"
            " out, ssprop_compile compiles dense steps as well"
        )
    model._compiled_call_impl = None


def _wants_gradients(output: Any) -> bool:
    """Return whether a backward may follow: none does while the whole network is frozen.

    True if no tensor is found in the output.
    """
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return not tensors or any(tensor.requires_grad for tensor in tensors)


def _call_in_place(model: nn.Module) -> Callable[..., Any]:
    """Return what to compile instead of a model whose own calls run the compiled variants."""
    if not type(model).__module__.startswith("torch.nn."):
        return model._call_impl

    # Before torch 2.15 Dynamo looks for the model's `forward` below `_call_impl`. It skips the
    # forward of torch's own modules, such as Sequential, unless something else calls it.
    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return call
