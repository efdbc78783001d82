"""freeze_dropped: optimizer steps do not change weights that a sparse backward has dropped."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["freeze_dropped"]


def freeze_dropped(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Keep an optimizer from changing weights that a sparse step has dropped.

    A dropped channel has a gradient of zero, but an optimizer still moves its weights by momentum
    and weight decay, and decays its moments. With this hook, a step in a sparse phase changes
    neither weights nor optimizer state if the gradient is exactly zero, in the layers that take
    part. `torch.optim.SparseAdam` has the same meaning. Dense steps do not change. The hook works
    with every optimizer whose state tensors have the shape of the weights, and with gradient
    scalers, clipping and accumulated batches.

    A step copies the layers' weights and state, which takes the same memory again.

    Args:
        optimizer: the optimizer of the model's parameters.
        model: what `ssprop_compile` returned.

    Returns:
        A handle; `handle.remove()` removes the hook.

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
    # This imports the compiler, which takes seconds.
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
    """Restores weights and state without a gradient after a step.

    Args:
        optimizer: the optimizer.
        scheduler: gives the drop rate, and so whether a step is sparse.
        weights: weights of the layers that take part.
    """

    def __init__(
        self, optimizer: Optimizer, scheduler: SparsityScheduler, weights: list[nn.Parameter]
    ) -> None:
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._weights = weights
        # What the step may change: a weight, and the key of its state (None for the weight itself).
        # `_before` has the values before the step; `_stays` is 1 where they are restored.
        self._places: list[tuple[nn.Parameter, str | None]] = []
        self._before: list[Tensor] = []
        self._stays: list[Tensor] = []

    @torch.no_grad()
    def before(self, *_args: Any) -> None:
        """Save what the step may change."""
        self._places, self._stays = [], []
        weights = [p for p in self._weights if p.grad is not None]
        if self._scheduler.drop_rate == 0 or not weights:
            return
        # Before the step, because optimizers may change gradients in place, as by weight decay.
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
        """Restore the values that had no gradient."""
        if self._places:
            # With a weight of 0 or 1, lerp returns exactly one of its ends.
            now = [self._at(*place) for place in self._places]
            torch._foreach_lerp_(now, self._before, self._stays)
        self._places, self._before, self._stays = [], [], []

    def _at(self, weight: nn.Parameter, key: str | None) -> Tensor:
        return weight if key is None else cast(Tensor, self._optimizer.state[weight][key])


class _Both(RemovableHandle):
    """A handle for several hooks."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
