"""ssprop_compile: the one verb."""

from typing import TYPE_CHECKING, Any

from torch import nn

from ssprop_fx.config import SparsityConfig
from ssprop_fx.scheduling.scheduler import SparsityScheduler

if TYPE_CHECKING:
    from ssprop_fx.runtime.module import SsPropModule

__all__ = ["ssprop_compile"]


def ssprop_compile(
    model: nn.Module,
    scheduler: SparsityScheduler,
    *,
    config: SparsityConfig | None = None,
    backend: str = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    in_place: bool = False,
) -> "SsPropModule":
    """Compile a model for training with scheduled sparse back-propagation.

    Behaves as `torch.compile(model)` does, and while `scheduler.drop_rate` is 0, in `eval()` mode
    and without gradients it is just that. In training steps whose drop rate is above 0 the
    backward of each participating layer is computed from the channels of the gradient of its
    output with the largest l2 norm (ssProp, arXiv 2408.12561, which ranks by mean magnitude:
    `SparsityConfig(score="mean_abs")`). One sparse compile serves every drop rate, or, where the
    schedule has one or two, each has its own with constant keep counts
    (`SparsityConfig(specialize=...)`).

    Args:
        model: the model; its source and its parameters stay as they are.
        scheduler: moves the drop rate; one scheduler may serve several models.
        config: which layers take part; `SparsityConfig()` by default.
        backend: `"inductor"`, or `"aot_eager"`, which compiles quickly and runs slowly.
        mode: as in `torch.compile`.
        options: as in `torch.compile`; a `joint_custom_pre_pass` in it still runs.
        fullgraph: as in `torch.compile`.
        dynamic: as in `torch.compile`.
        in_place: calls of `model` itself run compiled, too, as after `model.compile()`: for
            libraries that hold the model and save it, whose checkpoints then keep its names. What
            is returned serves `report` and the like. Copies of `model` are not compiled.

    Returns:
        A module to use in place of `model`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `backend` is unknown, or `mode` or `options` do not fit it.

    Examples:
        >>> from ssprop_fx import SparsityScheduler, constant, ssprop_compile
        >>> scheduler = SparsityScheduler(constant(0.5))
        >>> import torch
        >>> conv = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU())
        >>> model = ssprop_compile(conv, scheduler, backend="aot_eager")
        >>> model(torch.randn(2, 3, 8, 8)).sum().backward()
        >>> int((conv[0].weight.grad.flatten(1).abs().sum(1) > 0).sum())
        32
    """
    # They import the compiler, which takes seconds.
    from ssprop_fx.compiler.backend import BACKENDS
    from ssprop_fx.runtime.module import SsPropModule
    from ssprop_fx.runtime.variants import Variants

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(scheduler, SparsityScheduler):
        raise TypeError(
            f"scheduler must be a SparsityScheduler, got {type(scheduler).__name__}:"
            " wrap a schedule as SparsityScheduler(schedule)"
        )
    if config is not None and not isinstance(config, SparsityConfig):
        raise TypeError(f"config must be a SparsityConfig or None, got {type(config).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend != "inductor" and (mode is not None or options is not None):
        raise ValueError(f"mode and options are Inductor's; backend={backend!r} takes neither")
    if mode is not None and options is not None:
        raise ValueError("mode and options exclude each other, as in torch.compile: give one")
    model = getattr(model, "_orig_mod", model)
    compile_kwargs: dict[str, Any] = {
        "backend": backend,
        "fullgraph": fullgraph,
        "dynamic": dynamic,
    }
    if backend == "inductor":
        compile_kwargs.update(mode=mode, options=options)
    config = config or SparsityConfig()
    variants = Variants(model, scheduler, config, compile_kwargs, in_place=in_place)
    return SsPropModule(model, variants)
