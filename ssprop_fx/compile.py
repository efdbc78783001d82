"""ssprop_compile: compiles a model for sparse training."""

from typing import TYPE_CHECKING, Any

from torch import nn

from ssprop_fx.config import SparsityConfig
from ssprop_fx.scheduling.controllers import Controller
from ssprop_fx.scheduling.sample_rules import SampleRule, default_rule
from ssprop_fx.scheduling.scheduler import SparsityScheduler

if TYPE_CHECKING:
    from ssprop_fx.runtime.module import SsPropModule

__all__ = ["ssprop_compile"]


def ssprop_compile(
    model: nn.Module,
    scheduler: SparsityScheduler | None = None,
    *,
    config: SparsityConfig | None = None,
    backend: str = "inductor",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    in_place: bool = False,
) -> "SsPropModule":
    """Compile a model for training with sparse back-propagation.

    `model = ssprop_compile(model)` is all that the default recipe needs. The forward runs on the
    whole batch. The backward runs on the samples that matter: in each step `default_rule()` decides
    how many, by that step's own gradients.

    The result behaves like `torch.compile(model)`. While `scheduler.drop_rate` is 0, in `eval()`
    mode and without gradients it is exactly that. With a scheduler and the default config, training
    steps with a drop rate above 0 leave out channels: the backward of each participating layer uses
    only the channels of its output gradient with the largest l2 norms. (ssProp, arXiv 2408.12561,
    ranks channels by mean magnitude: `SparsityConfig(score="mean_abs")`.) One sparse compile serves
    every drop rate. If the schedule has only one or two, each gets its own compile with constant
    keep counts (`SparsityConfig(specialize=...)`).

    Args:
        model: the model; its source and its parameters do not change.
        scheduler: sets the drop rate; one scheduler may serve several models. By default
            `SparsityScheduler(controller=default_rule())`.
        config: which layers take part, and what is kept. By default `SparsityConfig()` with a
            scheduler, and `SparsityConfig(axis="sample")` without.
        backend: `"inductor"`, or `"aot_eager"`, which compiles quickly and runs slowly.
        mode: as in `torch.compile`.
        options: as in `torch.compile`; its `joint_custom_pre_pass` still runs.
        fullgraph: as in `torch.compile`.
        dynamic: as in `torch.compile`.
        in_place: calls of `model` itself run compiled too, as after `model.compile()`. Use this
            with libraries that hold and save the model: names in their checkpoints do not change.
            The returned module still works with `report` and the like. Copies of `model` are not
            compiled.

    Returns:
        A module to use in place of `model`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `backend` is unknown, `mode` or `options` do not fit it, or there is no
            scheduler for channels.

    Examples:
        >>> import torch
        >>> from ssprop_fx import SparsityScheduler, constant, ssprop_compile
        >>> model = ssprop_compile(nn.Linear(8, 10), backend="aot_eager")
        >>> model(torch.randn(32, 8)).square().mean().backward()
        >>> model.ssprop.samples.kept < 32
        True
        >>> scheduler = SparsityScheduler(constant(0.5))
        >>> conv = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU())
        >>> model = ssprop_compile(conv, scheduler, backend="aot_eager")
        >>> model(torch.randn(2, 3, 8, 8)).sum().backward()
        >>> int((conv[0].weight.grad.flatten(1).abs().sum(1) > 0).sum())
        32
    """
    # These import the compiler, which takes seconds.
    from ssprop_fx.compiler.backend import BACKENDS
    from ssprop_fx.runtime.module import SsPropModule
    from ssprop_fx.runtime.variants import Variants

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(scheduler, (Controller, SampleRule)):
        raise TypeError(
            f"scheduler must be a SparsityScheduler, got {scheduler!r}: write"
            f" SparsityScheduler(controller={scheduler!r})"
        )
    if scheduler is not None and not isinstance(scheduler, SparsityScheduler):
        raise TypeError(
            f"scheduler must be a SparsityScheduler, got {type(scheduler).__name__}:"
            " wrap a schedule as SparsityScheduler(schedule)"
        )
    if config is not None and not isinstance(config, SparsityConfig):
        raise TypeError(f"config must be a SparsityConfig or None, got {type(config).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend != "inductor" and (mode is not None or options is not None):
        raise ValueError(f"mode and options are for Inductor; backend={backend!r} takes neither")
    if mode is not None and options is not None:
        raise ValueError("mode and options exclude each other, as in torch.compile: give only one")
    if scheduler is None:
        config = config or SparsityConfig(axis="sample")
        if config.axis != "sample":
            raise ValueError(
                "scheduler must be a SparsityScheduler for channels, such as"
                ' SparsityScheduler(bar(0.8, period=2000)); only SparsityConfig(axis="sample")'
                " works without"
            )
        scheduler = SparsityScheduler(controller=default_rule())
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
