"""The no-edit backend: `torch.compile(model, backend="ssprop")`, without our code in a script.

An entry point in the group `torch_dynamo_backends` makes the name known to torch. `ssprop_compile`
chooses between two compiled forms of the model outside `torch.compile`, but a backend sees only
Dynamo's graphs. So each graph is compiled twice, and chooses a form at each call:

    model(x) -> Dynamo's guards -> PhasedGraph -> dense: as by plain torch.compile
                                               -> sparse: with the keep counts of the model

Both forms are compiled at once. If the second were compiled later, Dynamo would not guard on what
it assumes about symbolic shapes.

Torch does not tell a backend everything. The backend finds the model in the call's stack frames,
and the end of a training step through torch's hook on every optimizer.
"""

import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from ssprop_passes.errors import SsPropCompileError
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import TracingContext

from ssprop_fx.compiler.compiled_graph import CompiledGraph
from ssprop_fx.compiler.dynamo_graph import copy_graph, is_differentiable
from ssprop_fx.compiler.inductor import RestartAnalysis, compile_error
from ssprop_fx.compiler.node_marks import LAYER_CALLS
from ssprop_fx.named_backend.autostep import (
    SteppedVariant,
    find_stepped_variant,
    follow_optimizers,
    stepped_variant_maybe,
)
from ssprop_fx.named_backend.compiled_models import model_in_maybe
from ssprop_fx.named_backend.options import Settings, read_settings

__all__ = ["PhasedGraph", "ssprop"]


class PhasedGraph:
    """A compiled graph in a dense and a sparse form; each call chooses one.

    Args:
        dense: the graph as plain `torch.compile` compiles it.
        sparse: the sparse graph, for the model that it was compiled for.
        variant: the sparse variant of that model.
        read: reads the settings for another model; Dynamo runs compiled code for every model that
            passes its guards.
    """

    def __init__(
        self,
        dense: Callable[..., Any],
        sparse: CompiledGraph,
        variant: SteppedVariant,
        read: Callable[[], Settings],
    ) -> None:
        self._dense = dense
        self._compiled = sparse
        self._read = read
        self._sparse = weakref.WeakKeyDictionary({variant: sparse})

    def __call__(self, *args: Any) -> Any:
        """Run the graph: its sparse form in a sparse training step, else its dense form."""
        model = _compiled_model()
        variant = stepped_variant_maybe(model) or find_stepped_variant(model, self._read())
        if model.training:
            variant.count_forward(self)
        if not variant.is_due():
            output = self._dense(*args)
            variant.watch(output)
            return output
        sparse = self._sparse.get(variant)
        if sparse is None:
            sparse = self._sparse[variant] = variant.backend.adopt(self._compiled)
        return sparse(*args)


def ssprop(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured; `torch.compile(backend="ssprop")` calls this.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        mode: as in `torch.compile`.
        options: as in `torch.compile`, with the settings that `read_settings` describes.
        name: as in `torch.compile`; not used.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: there is no schedule, or a setting is unknown or out of range.
        SsPropCompileError: the graph could not be compiled, or does not belong to a model.
    """
    try:
        return _compile(gm, example_inputs, lambda: read_settings(mode, options, os.environ))
    except RestartAnalysis:
        # Not a failure: Dynamo must trace again, with a Python number as a constant.
        raise
    except Exception as error:
        is_settings = isinstance(error, (TypeError, ValueError))
        if not is_settings and not _is_trained(gm, example_inputs):
            # Behave as plain torch.compile: no backward could be silently dense.
            raise
        # On some exceptions Dynamo would run the graph eagerly, and so dense.
        failure = error if is_settings else compile_error(error)
        if not torch._dynamo.config.suppress_errors:
            raise failure from failure.__cause__
        suppressed = failure

    def fail(*_args: Any) -> Any:
        raise suppressed

    return fail


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], read: Callable[[], Settings]
) -> Callable[..., Any]:
    settings = read()
    sparse = None
    if _is_trained(gm, example_inputs):
        model = _compiled_model()
        variant = find_stepped_variant(model, settings)
        with _called_first(variant.is_due()):
            sparse = variant.backend(copy_graph(gm), example_inputs)
    patches = {"config_patches": dict(settings.inductor)} if settings.kind == "inductor" else {}
    with _called_first(sparse is None or not variant.is_due()):
        dense = lookup_backend(settings.kind)(gm, list(example_inputs), **patches)
    return dense if sparse is None else PhasedGraph(dense, sparse, variant, read)


def _is_trained(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Return whether a graph with these inputs has weights and a backward.

    Weights need not be parameters: `torch.func.functional_call` puts other tensors in their place.
    """
    has_weights = any(isinstance(value, nn.Parameter) for value in example_inputs) or any(
        node.target in LAYER_CALLS for node in gm.graph.nodes
    )
    return has_weights and is_differentiable(example_inputs)


def _called_first(is_first: bool) -> AbstractContextManager[None]:
    """Tell AOTAutograd whether the form compiled in this context is called before the other.

    Under DistributedDataParallel, Dynamo makes the first call itself, on fake tensors. The form
    that it calls must return fake tensors that once.
    """
    is_faked = TracingContext.get().fakify_first_call
    return TracingContext.patch(fakify_first_call=is_faked and is_first)


def _compiled_model() -> nn.Module:
    """Return the model that `torch.compile` was called on, found in the current stack frames.

    Raises:
        SsPropCompileError: `torch.compile` was not called on a model.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (model := model_in_maybe(frame)) is not None:
            return model
        frame = frame.f_back
    raise SsPropCompileError(
        "the ssprop backend compiles models: call torch.compile(model, backend='ssprop') on the"
        " torch.nn.Module itself, not on a function that calls it"
    )


# `torch.compile` imports this file. Start now, to notice if Dynamo never calls the backend.
follow_optimizers()
