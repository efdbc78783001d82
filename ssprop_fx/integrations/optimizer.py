"""freeze_dropped: optimizer steps do not change weights that a sparse backward has dropped."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["check_hooks", "freeze_dropped"]


def freeze_dropped(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Keep an optimizer from changing weights that a sparse step has dropped.

    A dropped channel has a gradient of zero, but an optimizer still moves its weights by momentum
    and weight decay, and decays its moments. With this hook, a step in a sparse phase changes
    neither weights nor optimizer state if the gradient is exactly zero, in the layers that take
    part. `torch.optim.SparseAdam` has the same meaning. Dense steps do not change. The hook works
    with gradient scalers, clipping, accumulated batches and closures. State without the shape of
    the weights, such as the row sums of Adafactor, is not restored; docs/optimizers.md says which
    of timm's optimizers have such state.

    A step copies the layers' weights and state, which takes the same memory again.

    Args:
        optimizer: the optimizer of the model's parameters.
        model: what `ssprop_compile` returned.

    Returns:
        A handle; `handle.remove()` removes the hook.

    Raises:
        TypeError: an argument has the wrong type, or the optimizer calls no hooks or searches along
            lines.
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
    check_hooks(optimizer)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer must take one gradient a step, but LBFGS takes several, and each may have"
            " dropped other channels"
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


def check_hooks(optimizer: Optimizer) -> None:
    """Check that an optimizer runs the hooks of its steps.

    `Optimizer.__init__` sees to that, but a wrapper such as timm's Lookahead does not call it, and
    accepts hooks that it never runs.

    Raises:
        TypeError: it does not run them.
    """
    if not getattr(type(optimizer).step, "hooked", False):
        raise TypeError(
            f"optimizer must run the hooks of its steps, but {type(optimizer).__name__} does not:"
            " use an optimizer that calls torch.optim.Optimizer.__init__"
        )


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
        self._is_saved = False

    def before(
        self, _optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Save what the step may change, as soon as there are gradients."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._save()
            return None
        self._is_saved = False

        def save_after() -> Any:
            result = closure()
            # Later calls, if any, come after the weights have moved.
            if not self._is_saved:
                self._save()
            return result

        return (args[0],), {**kwargs, "closure": save_after}

    @torch.no_grad()
    def _save(self) -> None:
        self._is_saved = True
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
