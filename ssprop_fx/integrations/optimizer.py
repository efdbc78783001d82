"""freeze_dropped: optimizer steps leave alone what a sparse backward has given no gradient."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["freeze_dropped"]


def freeze_dropped(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Let an optimizer leave alone the weights that a sparse step has dropped.

    A channel that is not selected has a gradient of zero, and an optimizer still moves its weights,
    by momentum and weight decay, and lets its moments decay. With this hook, a step in a sparse
    phase changes neither weights nor the optimizer's own tensors where the gradient is exactly
    zero, in the layers that take part: the meaning of `torch.optim.SparseAdam`. Dense steps are
    what they were. It works with every optimizer that keeps its state in tensors of the shape of
    the weights, and with gradient scalers, clipping and accumulated batches.

    A step takes copies of the layers' weights and state: as much memory again.

    Args:
        optimizer: holds the model's parameters.
        model: what `ssprop_compile` returned.

    Returns:
        A handle; `handle.remove()` ends it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the optimizer has no weight of a layer that takes part.

    Examples:
        >>> from ssprop_fx import SparsityScheduler, constant, ssprop_compile
        >>> layer = nn.Linear(8, 64)
        >>> model = ssprop_compile(layer, SparsityScheduler(constant(0.5)), backend="aot_eager")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> handle = freeze_dropped(optimizer, model)
        >>> before = layer.weight.detach().clone()
        >>> model(torch.randn(4, 8)).square().sum().backward()
        >>> optimizer.step()
        >>> int((layer.weight != before).any(1).sum())
        32
    """
    # It imports the compiler, which takes seconds.
    from ssprop_fx.runtime.module import SsPropModule

    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if not isinstance(model, SsPropModule):
        raise TypeError(f"model must come from ssprop_compile, got {type(model).__name__}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    inner = model._orig_mod
    layers = [inner.get_submodule(slot.name) for slot in model.ssprop.table.slots]
    weights = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
    frozen = [p for key, p in weights.items() if key in held]
    if not frozen:
        raise ValueError("optimizer must hold the model's parameters, got one that has none")
    hooks = _Hooks(optimizer, model.ssprop.scheduler, frozen)
    before = optimizer.register_step_pre_hook(hooks.before)
    after = optimizer.register_step_post_hook(hooks.after)
    return _Both(before, after)


class _Hooks:
    """Puts back, after a step, what was there before it.

    Args:
        optimizer: the optimizer.
        scheduler: tells whether a step is sparse.
        weights: those of the layers that take part.
    """

    def __init__(
        self, optimizer: Optimizer, scheduler: SparsityScheduler, weights: list[nn.Parameter]
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._weights = weights
        # Where the step is going to change something: a weight and, but for the weight itself, the
        # key of its state. With the values before it, and 1 where these stay.
        self._places: list[tuple[nn.Parameter, str | None]] = []
        self._before: list[Tensor] = []
        self._stays: list[Tensor] = []

    @torch.no_grad()
    def before(self, *_args: Any) -> None:
        """Keep what the step may change."""
        self._places, self._stays = [], []
        weights = [p for p in self._weights if p.grad is not None]
        if self._scheduler.drop_rate == 0 or not weights:
            return
        # Now: optimizers may change gradients in place, by weight decay for one.
        has_gradient = torch._foreach_sign(
            torch._foreach_abs([cast(Tensor, p.grad) for p in weights])
        )
        stays = torch._foreach_add(torch._foreach_neg(has_gradient), 1)
        for weight, mask in zip(weights, stays, strict=True):
            state = self._optimizer.state.get(weight, {})
            keys = [k for k, t in state.items() if getattr(t, "shape", None) == weight.shape]
            self._places += [(weight, key) for key in (None, *keys)]
            self._stays += [mask.to(self._at(weight, key).dtype) for key in (None, *keys)]
        values = [self._at(*place) for place in self._places]
        self._before = list(torch._foreach_mul(values, 1))

    @torch.no_grad()
    def after(self, *_args: Any) -> None:
        """Put it back where there was no gradient."""
        if self._places:
            # With a weight of 0 or 1, lerp returns one of its ends exactly.
            now = [self._at(*place) for place in self._places]
            torch._foreach_lerp_(now, self._before, self._stays)
        self._places, self._before, self._stays = [], [], []

    def _at(self, weight: nn.Parameter, key: str | None) -> Tensor:
        return weight if key is None else cast(Tensor, self._optimizer.state[weight][key])


class _Both(RemovableHandle):
    """Removes two hooks."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()
