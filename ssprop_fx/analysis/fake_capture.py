"""Capture a model's joint graphs with fake tensors: shapes, without memory or arithmetic.

Private torch: fake tensors, and Dynamo's record of the code that it has compiled.
"""

import copy
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from ssprop_passes.errors import CaptureError
from ssprop_passes.graph.graph_pass import is_joint_graph
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.eval_frame import _debug_get_cache_entry_list, remove_from_cache
from torch._dynamo.exc import TorchDynamoException
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from ssprop_fx.compiler.inductor import compile_aot_eager
from ssprop_fx.compiler.node_marks import mark_layers

__all__ = ["capture_joint_graphs", "run_on_fake_tensors"]


def capture_joint_graphs(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    visit: Callable[[fx.Graph], None],
) -> frozenset[str]:
    """Call `visit` with each joint graph of a training step of `model`, without running it.

    The step belongs to a copy of the model, in train mode and with fake tensors. Nodes carry the
    names of their layers (`SITE_KEY`), as in the sparse variant.

    Args:
        model: the model; it does not change.
        args: positional inputs; tensors may be real, fake or on the meta device.
        kwargs: keyword inputs.
        visit: called with each joint graph.

    Returns:
        Names of the layers that are in any graph.

    Raises:
        CaptureError: the model cannot be copied, or its step needs the values of tensors.
    """
    try:
        mode, model, inputs = _fake_copies(model, (tuple(args), dict(kwargs)))
    except Exception as error:
        message = f"the model cannot be copied to fake tensors: {_line(error)}"
        raise CaptureError(message) from error
    model.train()
    backend = _Backend(model, visit)
    step = _fresh_function(lambda model, args, kwargs: model(*args, **kwargs))
    # Static shapes, so that Dynamo does not compare these sizes with later ones of the user.
    compiled = torch.compile(step, backend=backend, dynamic=False, **_isolated())
    try:
        with _no_traces_in_dynamo(), torch.enable_grad(), mode:
            compiled(model, *inputs)
    except Exception as error:
        raise _trace_error(backend.error or error) from error
    if backend.error is not None:
        # Dynamo swallowed the error and ran eagerly.
        raise _trace_error(backend.error) from backend.error
    if not backend.was_called:
        raise CaptureError(
            "Dynamo captured no graph of the model: is compilation disabled"
            " (TORCHDYNAMO_DISABLE, torch.compiler.set_stance), or was the recompile limit hit?"
        )
    return frozenset(backend.captured)


def run_on_fake_tensors(model: nn.Module, *args: Any) -> Any:
    """Return what a copy of a model returns in train mode, as fake tensors: shapes alone.

    Args:
        model: the model; it does not change.
        args: its inputs; tensors may be real, fake or on the meta device.

    Raises:
        Exception: whatever the model raises, and errors of fake tensors if it reads values.
    """
    mode, copied, inputs = _fake_copies(model, args)
    with mode, torch.no_grad():
        return copied.train()(*inputs)


class _Backend:
    """A torch.compile backend that calls `visit` with each joint graph."""

    compiler_name = "ssprop_capture"

    def __init__(self, model: nn.Module, visit: Callable[[fx.Graph], None]) -> None:
        self.model = model
        self.visit = visit
        self.captured: set[str] = set()
        self.was_called = False
        self.error: Exception | None = None

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.was_called = True
        try:
            self.captured.update(mark_layers(gm, example_inputs, self.model))
            return compile_aot_eager(gm, example_inputs, self._visit_joint, {})
        except Exception as error:
            self.error = error
            # Dynamo does not take this class as a reason to run eagerly.
            raise CaptureError(_line(error)) from error

    def _visit_joint(self, graph: fx.Graph) -> None:
        if is_joint_graph(graph):
            self.visit(graph)


def _fake_copies(model: nn.Module, inputs: Any) -> tuple[FakeTensorMode, nn.Module, Any]:
    """Return the fake mode, and copies of model and inputs whose tensors are fake.

    Meta tensors become fake tensors on the device of the others, by default the CPU: what a model
    computes may depend on its device.
    """
    everything = chain(model.parameters(), model.buffers(), tree_leaves(inputs))
    tensors = [t for t in everything if isinstance(t, Tensor)]
    mode = detect_fake_mode(tensors) or FakeTensorMode(allow_non_fake_inputs=True)
    devices = [t.device for t in tensors if t.device.type != "meta"]
    device = devices[0] if devices else torch.device("cpu")

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.device.type == "meta":
            with mode:
                like = torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype, device=device
                )
            if isinstance(value, nn.Parameter):
                return nn.Parameter(like, value.requires_grad)
            return like.requires_grad_(value.requires_grad)
        if isinstance(value, FakeTensor):
            return value
        return mode.from_tensor(value, static_shapes=True)

    with FakeCopyMode(mode):
        model = copy.deepcopy(model)
    moved: dict[Tensor, Tensor] = {}  # so that tied parameters stay tied
    for module in model.modules():
        tables = cast(list[dict[str, Tensor | None]], [module._parameters, module._buffers])
        for table in tables:
            for name, value in table.items():
                if value is not None and value.device.type == "meta":
                    table[name] = moved.setdefault(value, fake(value))
    return mode, model, tree_map(fake, inputs)


def _fresh_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a function with its own code object; compiled forms are freed with it."""
    function = cast(types.FunctionType, function)
    return types.FunctionType(function.__code__.replace(), function.__globals__)


def _isolated() -> dict[str, Any]:
    """Return `torch.compile` arguments that keep this compile out of other recompile counts."""
    is_known = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if is_known else {}


@contextmanager
def _no_traces_in_dynamo() -> Iterator[None]:
    """Make Dynamo forget what it compiles inside this context.

    After a graph break Dynamo compiles the code of the model's classes, which the user's own
    compiled models share. Code that they have already compiled keeps its entries. If this torch
    release cannot isolate recompiles, each capture of such code counts as a recompile.
    """
    compiled: set[types.CodeType] = set()

    def note(code: types.CodeType, new_code: types.CodeType) -> None:
        if not _debug_get_cache_entry_list(code):
            compiled.add(code)

    handle = register_bytecode_hook(note)
    try:
        yield
    finally:
        handle.remove()
        for code in compiled:
            remove_from_cache(code)


def _trace_error(error: BaseException) -> CaptureError:
    return CaptureError(f"the model cannot be traced on fake tensors: {_line(error)}")


def _line(error: BaseException) -> str:
    """Return the class of an error's root cause and the first line of its message."""
    # Dynamo raises some of its errors "from None", with little information.
    while deeper := error.__cause__ or (
        error.__context__ if isinstance(error, TorchDynamoException) else None
    ):
        error = deeper
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
