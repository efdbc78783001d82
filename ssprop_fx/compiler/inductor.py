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
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import TensorifyScalarRestartAnalysis as RestartAnalysis

__all__ = [
    "RestartAnalysis",
    "compile_aot_eager",
    "compile_error",
    "compile_inductor",
    "inductor_decompositions",
    "inductor_options",
    "is_inductor_option",
    "passes_in_force",
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
) -> Callable[..., Any]:
    """Compile a graph with Inductor; the passes run in its joint-graph hook."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # The weight of a 2d convolution on a CPU: our C++ kernels may serve it.
    if any(isinstance(i, nn.Parameter) and i.ndim == 4 and i.is_cpu for i in inputs):
        start_compiling()

    @functools.wraps(compile_fx_inner)
    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        # The backward compiles later, outside `SparseBackend.__call__`.
        try:
            return compile_fx_inner(*args, **kwargs)
        except Exception as error:
            failure = compile_error(error)
            raise failure from failure.__cause__

    # As patches, not as a global setting, because the backward compiles later.
    patches = {**options, "joint_custom_pre_pass": passes}
    compiled = compile_fx(gm, inputs, compile_inner, config_patches=patches)
    return cast(Callable[..., Any], compiled)


def compile_aot_eager(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    passes: Callable[[fx.Graph], None],
    options: dict[str, Any],
) -> Callable[..., Any]:
    """Compile a graph with AOTAutograd alone: slow to run, quick to compile."""

    def joint_pass(joint: fx.GraphModule, _inputs: Any) -> fx.GraphModule:
        passes(joint.graph)
        joint.recompile()
        return joint

    with torch._functorch.config.patch(joint_custom_pass=joint_pass):
        return lookup_backend("aot_eager")(gm, list(inputs))


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the decompositions with which Inductor traces joint graphs."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


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


def passes_in_force(options: Mapping[str, Any]) -> Any:
    """Return the user's `joint_custom_pre_pass` for Inductor: a pass, several passes or None."""
    return options.get("joint_custom_pre_pass", torch._inductor.config.joint_custom_pre_pass)
