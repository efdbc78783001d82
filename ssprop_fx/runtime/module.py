"""SsPropModule: stands in for a compiled model, as `torch.compile`'s module does."""

import copy
from typing import Any, cast

import torch
from torch import nn

from ssprop_fx.compiler.backward_state import Memory
from ssprop_fx.config import SparsityConfig
from ssprop_fx.runtime.variants import Variants
from ssprop_fx.scheduling.keep_counts import KeepCounts
from ssprop_fx.scheduling.scheduler import SparsityScheduler

__all__ = ["SsPropModule"]


class SsPropModule(nn.Module):
    """What `ssprop_compile` returns; use it in place of the model.

    It shares the model's parameters, buffers, submodules, mode and attributes, under the names
    that `torch.compile`'s module gives them (`_orig_mod.` in the state dict).

    Args:
        model: the model.
        variants: its compiled variants.

    Attributes:
        ssprop: the compiled variants, with their scheduler, keep counts and memory.
    """

    # `_is_full_backward_hook` belongs to the hooks, which this module has for itself.
    _own = frozenset({"_orig_mod", "ssprop", "training", "_is_full_backward_hook"})

    def __init__(self, model: nn.Module, variants: Variants) -> None:
        super().__init__()
        self._orig_mod = model
        self.ssprop = variants

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model: its sparse form in a sparse training step, else its dense form.

        Raises:
            RuntimeError: torch.fx traces this module itself.
        """
        if torch.compiler.is_exporting():
            # Dynamo, which torch.export may use, does not look into `run`.
            return self._orig_mod(*args, **kwargs)
        if isinstance(cast(Any, args), torch.fx.Proxy):
            raise RuntimeError(
                "torch.fx cannot trace what ssprop_compile returned: trace the model itself"
            )
        return self.ssprop.run(*args, **kwargs)

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return "_orig_mod" not in self.__dict__["_modules"] or self._orig_mod.training

    @training.setter
    def training(self, mode: bool) -> None:
        # nn.Module's own __init__ runs before the model is set.
        if "_orig_mod" in self.__dict__.get("_modules", {}):
            self._orig_mod.training = mode

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

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self._orig_mod)})

    def __deepcopy__(self, memo: dict[int, Any]) -> "SsPropModule":
        model = copy.deepcopy(self._orig_mod, memo)
        return type(self)(
            model, self.ssprop.for_copy(model, copy.deepcopy(self.ssprop.memory, memo))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        own = self.ssprop
        state = own.scheduler, own.config, own.compile_kwargs, own.counts, own.memory
        return _restore, (self._orig_mod, *state)


def _restore(
    model: nn.Module,
    scheduler: SparsityScheduler,
    config: SparsityConfig,
    compile_kwargs: dict[str, Any],
    counts: KeepCounts,
    memory: Memory,
) -> SsPropModule:
    variants = Variants(model, scheduler, config, compile_kwargs, counts=counts, memory=memory)
    return SsPropModule(model, variants)
