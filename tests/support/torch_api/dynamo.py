"""What a backend gets from Dynamo."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from captures import aot, capture, captured
from torch import Tensor, fx, nn

from torch_api.canary import relies_on

aten = torch.ops.aten


@relies_on("torch._guards.detect_fake_mode", "meta.example_value", ".from_tensor")
def the_placeholders_of_a_dynamo_graph_hold_fake_tensors_of_one_mode() -> None:
    """`meta["example_value"]` of inputs and outputs is a fake tensor. `detect_fake_mode` finds its
    mode. `mode.from_tensor(t, static_shapes=True)` makes another fake tensor of that mode.
    """
    from torch._guards import detect_fake_mode

    graph = captured().dynamo.graph
    values = [n.meta["example_value"] for n in graph.nodes if n.op != "output"]
    mode = detect_fake_mode(values[:1])
    assert mode is not None
    assert all(v.fake_mode is mode for v in values)
    like = mode.from_tensor(torch.ones(3, dtype=torch.int64), static_shapes=True)
    assert like.fake_mode is mode
    assert (like.shape, like.dtype) == ((3,), torch.int64)
    assert all(type(size) is int for size in like.shape)


@relies_on("._dynamo_source", "._param_name_to_source", "._source_to_user_stacks", "._root")
def a_dynamo_graph_may_be_copied_and_given_an_input() -> None:
    """Dynamo's placeholders carry `_dynamo_source`. Its graph module carries
    `_param_name_to_source` and `_source_to_user_stacks`. AOTAutograd reads all three. A placeholder
    after the others whose source is None becomes an input of the joint graph. `graph._root` comes
    before all nodes.
    """
    from torch._guards import detect_fake_mode

    seen: list[fx.Graph] = []

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        assert isinstance(gm._param_name_to_source, dict)
        assert isinstance(gm._source_to_user_stacks, dict)
        # Dynamo reads its own placeholders again afterwards.
        changed = fx.GraphModule(gm, fx.Graph())
        nodes: dict[fx.Node, fx.Node] = {}
        changed.graph.output(changed.graph.graph_copy(gm.graph, nodes))
        changed.meta = gm.meta
        changed._param_name_to_source = gm._param_name_to_source
        changed._source_to_user_stacks = gm._source_to_user_stacks
        for old in gm.graph.find_nodes(op="placeholder"):
            assert old._dynamo_source is not None
            nodes[old]._dynamo_source = old._dynamo_source
        with changed.graph.inserting_after(changed.graph._root):
            first = changed.graph.placeholder("first")
        assert next(iter(changed.graph.nodes)) is first
        changed.graph.erase_node(first)
        extra, placeholders = torch.arange(4), changed.graph.find_nodes(op="placeholder")
        with changed.graph.inserting_after(placeholders[-1]):
            new = changed.graph.placeholder("extra")
        mode = detect_fake_mode([p.meta["example_value"] for p in placeholders])
        new.meta["example_value"] = mode.from_tensor(extra, static_shapes=True)
        new._dynamo_source = None
        changed.recompile()
        compiled = aot(changed, [*inputs, extra], lambda _kind, part: seen.append(part.graph))
        return lambda *args: compiled(*args, extra)

    capture(compile_graph)
    last = seen[0].find_nodes(op="placeholder")[-1]
    assert str(last.target).startswith("primals")
    assert last.meta["val"].dtype == torch.int64


@relies_on("meta.nn_module_stack")
def the_innermost_module_of_a_node_is_known_by_its_id() -> None:
    """The last key of `meta["nn_module_stack"]` in a Dynamo graph is `id(module)`, in digits, of
    the innermost module whose forward is running. For some calls `@n` follows.
    """
    layer = nn.Linear(5, 5)
    model = nn.Sequential(nn.Flatten(0, -2), nn.Sequential(layer, nn.ReLU(), layer))
    keys: list[str] = []

    def compile_graph(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Any:
        products = [n for n in gm.graph.nodes if n.target is torch._C._nn.linear]
        keys.extend(str([*n.meta["nn_module_stack"]][-1]) for n in products)
        return gm.forward

    capture(compile_graph, model)
    assert [key.split("@")[0] for key in keys] == [str(id(layer))] * 2


@relies_on("torch._dynamo.eval_frame")
def a_call_of_a_compiled_model_shows_the_model_in_its_frames() -> None:
    """A backend, and the code that it returns, run under a frame of `compile_wrapper` in
    `torch._dynamo.eval_frame`. That frame's local variable `fn` is the model, a method of the
    model, or a function with one of these as `__wrapped__`.
    """
    found: list[object] = []

    def look() -> None:
        for info in inspect.stack():
            name = info.frame.f_globals.get("__name__"), info.frame.f_code.co_name
            if name == ("torch._dynamo.eval_frame", "compile_wrapper"):
                fn = info.frame.f_locals["fn"]
                while fn is not None and not isinstance(getattr(fn, "__self__", fn), nn.Module):
                    fn = getattr(fn, "__wrapped__", None)
                found.append(getattr(fn, "__self__", fn))

    def compile_graph(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Any:
        look()

        def run(*args: Any) -> Any:
            look()
            return gm.forward(*args)

        return run

    model = capture(compile_graph)
    assert found == [model, model]


@relies_on("torch._dynamo.eval_frame", "._torchdynamo_orig_backend")
def a_compiled_model_is_held_by_a_function_that_names_the_backend() -> None:
    """`torch.compile` makes a function `compile_wrapper` of `torch._dynamo.eval_frame`. Its cell
    `fn` holds a method of the model, or a function with one of these as `__wrapped__`. Its cell
    `callback` leads, by `_torchdynamo_orig_backend`, to an object whose `compiler_name` is the name
    of the backend, or of the function that it is.
    """
    import gc
    from types import FunctionType

    def some_backend(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Any:
        return gm.forward

    model, in_place = nn.Linear(2, 2), nn.Linear(2, 2)
    held = torch.compile(model, backend=some_backend)
    in_place.compile(backend=some_backend)
    found = {}
    for each in gc.get_objects():
        if type(each) is not FunctionType or each.__code__.co_name != "compile_wrapper":
            continue
        assert each.__globals__["__name__"] == "torch._dynamo.eval_frame"
        cells = dict(zip(each.__code__.co_freevars, each.__closure__ or (), strict=True))
        fn, callback = (cells[name].cell_contents for name in ("fn", "callback"))
        while hasattr(callback, "_torchdynamo_orig_backend"):
            callback = callback._torchdynamo_orig_backend
        while fn is not None and not isinstance(getattr(fn, "__self__", fn), nn.Module):
            fn = getattr(fn, "__wrapped__", None)
        found[getattr(fn, "__self__", fn)] = getattr(callback, "compiler_name", None)
    assert found[held._orig_mod] == found[in_place] == "some_backend"


@relies_on("torch._guards.TracingContext", ".fakify_first_call")
def a_backend_runs_in_a_tracing_context() -> None:
    """`TracingContext.get()` works while a backend runs. Under DistributedDataParallel, Dynamo uses
    its `fakify_first_call` to ask for fake outputs of the first call. Otherwise that is False, and
    `TracingContext.patch` sets it temporarily.
    """
    from torch._guards import TracingContext

    values: list[bool] = []

    def compile_graph(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Any:
        values.append(TracingContext.get().fakify_first_call)
        with TracingContext.patch(fakify_first_call=True):
            values.append(TracingContext.get().fakify_first_call)
        values.append(TracingContext.get().fakify_first_call)
        return gm.forward

    capture(compile_graph)
    assert values == [False, True, False]


@relies_on("torch._dynamo.config.suppress_errors")
def suppressed_errors_of_a_backend_run_eagerly() -> None:
    """If `suppress_errors` is set, an error in a backend makes Dynamo run the code eagerly."""
    from torch._dynamo import config

    def fail(_gm: fx.GraphModule, _inputs: Sequence[Any]) -> Any:
        raise RuntimeError("not compiled")

    assert config.suppress_errors is False
    model = nn.Linear(5, 5)
    with config.patch(suppress_errors=True):
        torch._dynamo.reset()
        x = torch.ones(2, 5)
        assert torch.equal(torch.compile(model, backend=fail)(x), model(x))


@relies_on("torch._dynamo.backends.registry.lookup_backend")
def backends_are_found_by_name() -> None:
    """`lookup_backend` returns `(graph module, inputs) -> callable` for "inductor", "aot_eager"."""
    from torch._dynamo.backends.registry import lookup_backend

    assert callable(lookup_backend("inductor"))
    backend = lookup_backend("aot_eager")
    capture(lambda gm, inputs: backend(gm, list(inputs)))


@relies_on(
    "torch._dynamo.convert_frame.register_bytecode_hook",
    "torch._dynamo.eval_frame._debug_get_cache_entry_list",
    "torch._dynamo.eval_frame.remove_from_cache",
)
def compiled_code_can_be_counted_and_forgotten() -> None:
    """Dynamo calls a bytecode hook with each code object that it compiles, before the entry is in
    the cache, until `handle.remove()`. `_debug_get_cache_entry_list(code)` lists the compiled
    entries of a code object, and `remove_from_cache(code)` removes them.
    """
    from torch._dynamo.convert_frame import register_bytecode_hook
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, remove_from_cache

    def double(x: Tensor) -> Tensor:
        return x * 2

    counts: list[int] = []

    def note(code: Any, _new_code: Any) -> None:
        if code is double.__code__:
            counts.append(len(_debug_get_cache_entry_list(code)))

    compiled = torch.compile(double, backend="eager", dynamic=False)
    handle = register_bytecode_hook(note)
    compiled(torch.ones(2))
    compiled(torch.ones(3))
    handle.remove()
    compiled(torch.ones(4))
    assert counts == [0, 1]
    assert len(_debug_get_cache_entry_list(double.__code__)) == 3
    remove_from_cache(double.__code__)
    assert not _debug_get_cache_entry_list(double.__code__)


@relies_on("torch._dynamo.exc.TensorifyScalarRestartAnalysis")
def a_backend_may_ask_for_another_trace() -> None:
    """Inductor raises this in a backend if a Python number must be a constant. It is not a failure:
    a backend passes it on to Dynamo, which traces again.
    """
    from torch._dynamo.exc import RestartAnalysis, TensorifyScalarRestartAnalysis

    assert issubclass(TensorifyScalarRestartAnalysis, RestartAnalysis)


@relies_on("._is_full_backward_hook")
def a_module_keeps_the_kind_of_its_backward_hooks() -> None:
    """`register_full_backward_hook` sets this on the module, which otherwise calls no such hook."""
    module = nn.Identity()
    module.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    assert module._is_full_backward_hook


@relies_on("torch._dynamo.exc.TorchDynamoException")
def errors_of_dynamo_have_one_base_class() -> None:
    """Dynamo's own errors, such as for a graph break under `fullgraph`, derive from
    `TorchDynamoException`.
    """
    from torch._dynamo.exc import TorchDynamoException

    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x

    try:
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))
    except TorchDynamoException:
        return
    raise AssertionError("no such error")
