"""The two compilers of the sparse variant's graphs, with a pass on the joint graph.

Private torch: Inductor's `compile_fx`, and the hooks of Inductor and AOTAutograd for that pass.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.graph.graph_pass import PassList
from ssprop_passes.kernels.cpp_loader import start_compiling
from ssprop_passes.transforms.kept_samples import KeptSamplesPass
from torch import fx, nn
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TensorifyScalarRestartAnalysis as RestartAnalysis
from torch._guards import detect_fake_mode

from ssprop_fx.compiler.sliced_graph import compile_sliced

__all__ = [
    "RestartAnalysis",
    "compile_aot_eager",
    "compile_error",
    "compile_inductor",
    "get_hooks",
    "inductor_options",
    "is_inductor_option",
]


def compile_error(error: Exception) -> SsPropCompileError:
    """Return the error that the user sees for a failure inside the compiler, with its cause."""
    if isinstance(error, SsPropCompileError):
        return error
    ours = SsPropCompileError(
        f"the sparse variant of the model could not be compiled: {type(error).__name__}: {error}"
    )
    ours.__cause__ = error
    return ours


def compile_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    passes: PassList,
    options: dict[str, Any],
    samples: KeptSamplesPass | None = None,
) -> Callable[..., Any]:
    """Compile a graph with Inductor; the passes run in its joint-graph hooks.

    Args:
        gm: the graph that Dynamo captured.
        inputs: its example inputs.
        passes: the passes on the joint graph.
        options: Inductor configuration patches.
        samples: the pass that prepares the backward for the kept samples, the last one; None for a
            backward of the whole batch.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # The weight of a 2d convolution on a CPU: our C++ kernels may serve it.
    if any(isinstance(i, nn.Parameter) and i.ndim == 4 and i.is_cpu for i in inputs):
        start_compiling()

    @functools.wraps(compile_fx_inner)
    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        # The backward compiles later, outside `SparseBackend.__call__`.
        try:
            if samples is None:
                return compile_fx_inner(*args, **kwargs)
            return _compile_sliced(samples, *args, **kwargs)
        except Exception as error:
            failure = compile_error(error)
            raise failure from failure.__cause__

    # As patches, not as a global setting, because the backward compiles later.
    patches = {**options, "joint_custom_pre_pass": passes}
    if samples is None:
        return cast(
            Callable[..., Any], compile_fx(gm, inputs, compile_inner, config_patches=patches)
        )
    # After all others: what they insert may be saved as well.
    last = get_hooks(options, "joint_custom_post_pass")
    patches["joint_custom_post_pass"] = PassList([*last, samples])
    with _without_autograd_cache():
        return cast(
            Callable[..., Any], compile_fx(gm, inputs, compile_inner, config_patches=patches)
        )


def _compile_sliced(
    samples: KeptSamplesPass,
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    is_backward: bool = False,
    **kwargs: Any,
) -> Any:
    """Compile the forward as it is, and the backward for the kept samples."""
    from torch._inductor.compile_fx import compile_fx_inner

    def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        # Where several codes are right, Inductor chooses by the batch size and guards on it. Such
        # guards may leave a single batch size, and they hold for N, not for k.
        with _shape_env(inputs).suppress_guards():
            compiled: Any = compile_fx_inner(gm, inputs, is_backward=is_backward, **kwargs)
            return cast(Callable[..., Any], compiled)

    if not is_backward:
        return compile_graph(gm, list(inputs))
    return compile_sliced(compile_graph, gm, inputs, samples.batch)


def _shape_env(inputs: Sequence[Any]) -> Any:
    mode = detect_fake_mode(inputs)
    assert mode is not None
    assert mode.shape_env is not None
    return mode.shape_env


def _without_autograd_cache() -> Any:
    """Turn off AOTAutograd's cache: a hit would compile no backward, so nothing would slice it."""
    return torch._functorch.config.patch(enable_autograd_cache=False)


def compile_aot_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    passes: Callable[[fx.Graph], None],
    options: dict[str, Any],
    samples: KeptSamplesPass | None = None,
) -> Callable[..., Any]:
    """Compile a graph with AOTAutograd alone: slow to run, quick to compile."""

    def joint_pass(joint: fx.GraphModule, _inputs: Any) -> fx.GraphModule:
        passes(joint.graph)
        if samples is not None:
            samples(joint.graph)
        joint.recompile()
        return joint

    with torch._functorch.config.patch(joint_custom_pass=joint_pass):
        if samples is None:
            return lookup_backend("aot_eager")(gm, list(inputs))

        compiler: Any = lookup_backend("aot_eager")

        def compile_backward(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            return compile_sliced(boxed_nop, gm, inputs, samples.batch)

        with _without_autograd_cache():
            compiled: Callable[..., Any] = compiler(gm, list(inputs), bw_compiler=compile_backward)
            return compiled


def inductor_options(
    mode: str | None, options: dict[str, Any] | None, dynamic: bool | None = None
) -> dict[str, Any]:
    """Return the Inductor configuration patches for arguments of `torch.compile`."""
    from torch._inductor import list_mode_options

    if mode is not None:
        return dict(list_mode_options(mode, dynamic))
    return {key.replace("-", "_"): value for key, value in (options or {}).items()}


def is_inductor_option(name: str) -> bool:
    """Return whether Inductor's configuration has an entry with this name."""
    return name.replace("-", "_") in torch._inductor.config.get_config_copy()


def get_hooks(options: Mapping[str, Any], name: str) -> list[Any]:
    """Return the user's passes for one of Inductor's hooks, such as `joint_custom_pre_pass`."""
    hook = options.get(name, getattr(torch._inductor.config, name))
    hooks: Sequence[Any] = hook if isinstance(hook, (list, tuple)) else [hook]
    return [hook for hook in hooks if hook is not None]
