"""Stepping: schedules advance with the optimizer, because no script calls `scheduler.step()`."""

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.named_backend.compiled_models import compiled_models
from ssprop_fx.named_backend.options import Settings
from ssprop_fx.named_backend.progress import Progress
from ssprop_fx.runtime.sparse_variant import SparseVariant
from ssprop_fx.runtime.tripwire import Problem
from ssprop_fx.runtime.user_warning import warn_no_effect
from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = [
    "SteppedVariant",
    "find_stepped_variant",
    "follow_optimizers",
    "stepped_variant_maybe",
]

_variants: "weakref.WeakKeyDictionary[nn.Module, SteppedVariant]" = weakref.WeakKeyDictionary()

# We warn after this many training forwards of one graph without an optimizer step.
_FORWARDS_PATIENCE = 1000

# At these steps of an optimizer we look for models that Dynamo has never called the backend for.
_LOOK_AT = frozenset(10**power for power in range(1, 10))


class SteppedVariant(SparseVariant):
    """A sparse variant whose scheduler steps by itself, once for each optimizer step.

    Several optimizers may hold parameters of one model or wrap one another. The schedule steps with
    the first optimizer that steps after a forward.

    Args:
        model: the model; this does not keep it alive.
        settings: its settings.
        scheduler: its scheduler; by default a new one.
        progress: counts its steps; by default a new one.

    Attributes:
        made: number of variants made so far.
    """

    made: ClassVar[int] = 0

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        scheduler: SparsityScheduler | None = None,
        progress: Progress | None = None,
    ) -> None:
        if scheduler is None:
            scheduler = SparsityScheduler(settings.schedule, settings.controller)
            scheduler.load_state_dict({"last_step": settings.start_step})
        super().__init__(model, scheduler, settings.config, settings.kind, dict(settings.inductor))
        self.settings = settings
        self.progress = progress or Progress(type(model).__name__)
        self._leader: weakref.ref[Optimizer] | None = None
        self._forwards: Counter[object] = Counter()
        follow_optimizers()
        SteppedVariant.made += 1

    def count_forward(self, graph: object) -> None:
        """Count a training forward of a graph."""
        self.agree()
        self._forwards[graph] += 1
        if self._forwards[graph] == _FORWARDS_PATIENCE:
            message = (
                f"the schedule stands still at step {self.scheduler.last_step}, drop rate"
                f" {self.scheduler.drop_rate:g}: {_FORWARDS_PATIENCE} training forwards ran, and no"
                " step of a torch.optim.Optimizer that holds parameters of the model. Unless you"
                " accumulate so many batches, use ssprop_compile and call scheduler.step()."
            )
            self._warn(Problem("stands still", message))

    def end_step(self, optimizer: Optimizer) -> None:
        """Advance the schedule if this optimizer step ends a training step of the model."""
        leads = self._leader is not None and self._leader() is optimizer
        if not leads and not (self._forwards and _holds(optimizer, self.backend.model)):
            return
        self._leader = weakref.ref(optimizer)
        if self.is_due():
            self.check_step()
        self._forwards.clear()
        self.progress.end_step(self)
        self.tripwire.start()
        self.scheduler.step()
        self.progress.begin_step(self)


def find_stepped_variant(model: nn.Module, settings: Settings) -> SteppedVariant:
    """Return the variant of a model; a new one if its settings or layers have changed.

    Args:
        model: the model.
        settings: its settings. If they have changed, the schedule starts again.
    """
    variant = _variants.get(model)
    if variant is None or variant.settings != settings:
        variant = _variants[model] = SteppedVariant(model, settings)
    elif find_slots(model, settings.config) != variant.table:
        variant = _variants[model] = SteppedVariant(
            model, settings, variant.scheduler, variant.progress
        )
    return variant


def stepped_variant_maybe(model: nn.Module) -> SteppedVariant | None:
    """Return the variant of a model under the no-edit backend; None if it has none yet."""
    return _variants.get(model)


def _holds(optimizer: Optimizer, model: nn.Module) -> bool:
    """Return whether an optimizer holds a parameter of a model."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in held for p in model.parameters())


@functools.cache
def follow_optimizers() -> None:
    """Let every optimizer step end the training step of the model whose parameters it holds."""
    # A compiled optimizer must not trace the hook: it would recompile at each step.
    hook = torch.compiler.disable(_end_steps)  # type: ignore[no-untyped-call]
    register_optimizer_step_post_hook(hook)


_steps: "weakref.WeakKeyDictionary[Optimizer, int]" = weakref.WeakKeyDictionary()
_named: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def _end_steps(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    for variant in list(_variants.values()):
        variant.end_step(optimizer)
    steps = _steps[optimizer] = _steps.get(optimizer, 0) + 1
    if steps not in _LOOK_AT:
        return
    never_called = set(_never_called(optimizer))
    if never_called or (not SteppedVariant.made and steps == min(_LOOK_AT)):
        _named.update(never_called)
        names = ", ".join(sorted(type(m).__name__ for m in never_called)) or "any model"
        warn_no_effect(
            f"{steps} optimizer steps were dense, because Dynamo has not called the ssprop backend"
            f" for a training step of {names}. Likely causes: compilation is disabled"
            " (torch.compiler.set_stance, TORCHDYNAMO_DISABLE), or Dynamo runs the whole model"
            " eagerly, for example DistributedDataParallel(torch.nn.Sequential(...)).",
        )


def _never_called(optimizer: Optimizer) -> Iterator[nn.Module]:
    """Yield the compiled models that this step has trained and that the backend never saw."""
    seen = {id(p) for model in list(_variants) for p in model.parameters()}
    for model in compiled_models("ssprop"):
        trained = [p for p in model.parameters() if p.grad is not None]
        is_seen = any(id(p) in seen for p in trained)
        if trained and not is_seen and model not in _named and _holds(optimizer, model):
            yield model
