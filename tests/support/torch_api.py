"""Torch's private names that the packages use, what the packages rely on, and a canary for each.

A canary is a function that tries the behaviour on torch alone. If it fails, a torch release has
changed what its docstring says, and the files that use the name must follow. A canary imports
inside its body, so that a missing name fails only that canary.

Names are dotted as in an import. `.name` stands for an attribute (also one without an underscore of
Dynamo's and AOTAutograd's objects), and `meta.key` for a key of `node.meta`.
"""

import copy
import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from captures import aot, capture, captured
from torch import Tensor, fx, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class Canary:
    """A check of private names, and a text of what the packages rely on."""

    names: tuple[str, ...]
    relied_on: str
    check: Callable[[], None]


CANARIES: list[Canary] = []


def relies_on(*names: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(check: Callable[[], None]) -> Callable[[], None]:
        CANARIES.append(Canary(names, inspect.cleandoc(check.__doc__ or ""), check))
        return check

    return register


def explanation(canary: Canary, users: Sequence[str]) -> str:
    return (
        f"torch {torch.__version__} has changed {', '.join(canary.names)}."
        f" {', '.join(users)} rely on this: {' '.join(canary.relied_on.split())}"
    )


def find(graph: fx.Graph, target: object) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=target)


# What a backend gets from Dynamo.


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


# The joint graph.


@relies_on("torch._functorch.config.patch")
def the_joint_graph_can_be_replaced() -> None:
    """`torch._functorch.config.joint_custom_pass` is a function of the joint graph module and its
    inputs. It sees forward and backward in one graph, and AOTAutograd partitions what it returns.
    The call comes before a backend returns.
    """
    graph = captured().joint
    names = [str(n.target) for n in graph.find_nodes(op="placeholder")]
    assert sum(name.startswith("primals") for name in names) == len(captured().inputs)
    assert sum("tangents" in name for name in names) == 1
    assert captured().called(aten.convolution.default)
    assert captured().called(aten.convolution_backward.default)


@relies_on("meta.val", ".fake_mode", ".hint")
def nodes_of_the_joint_graph_carry_fake_values() -> None:
    """`meta["val"]` of each node is a fake tensor with its `fake_mode`, or a tuple of fake tensors.
    `size.node.hint` is the value of a symbolic size in this compilation.
    """
    (node,) = captured().called(aten.convolution_backward.default)
    assert node.meta["val"][1].shape == (4, 3, 3, 3)
    assert node.args[0].meta["val"].fake_mode is node.args[1].meta["val"].fake_mode
    hints: list[int] = []

    def compile_graph(gm: fx.GraphModule, _inputs: Sequence[Any]) -> Any:
        values = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        hints.extend(s.node.hint for v in values if isinstance(v, Tensor) for s in v.shape)
        return gm.forward

    torch.compile(torch.relu, backend=compile_graph, dynamic=True)(torch.ones(7, 5))
    assert hints == [7, 5]


@relies_on("meta.custom")
def custom_metadata_reaches_the_backward() -> None:
    """A backend may write an entry into `meta["custom"]` of a node of Dynamo's graph. In the joint
    graph, the nodes of that call and of its backward carry the entry, and no other products do.
    """
    graph = captured()
    (convolution,) = graph.called(aten.convolution.default)
    (backward,) = graph.called(aten.convolution_backward.default)
    assert backward.meta["custom"] == convolution.meta["custom"]
    products = [*graph.called(aten.addmm.default), *graph.called(aten.mm.default)]
    marks = [n.meta["custom"]["mark"] for n in products]
    assert sorted(map(marks.count, set(marks))) == [3, 3]
    assert backward.meta["custom"]["mark"] not in marks


@relies_on("meta.seq_nr")
def a_linear_call_and_its_backward_share_a_number() -> None:
    """The forward product of a linear call and its two backward products carry the same
    `meta["seq_nr"]`. Another call has another number.
    """
    graph = captured()
    numbers = [n.meta["seq_nr"] for n in graph.called(aten.addmm.default)]
    assert len(set(numbers)) == 2
    backward = [n.meta["seq_nr"] for n in graph.called(aten.mm.default)]
    assert sorted(backward) == sorted(numbers * 2)


@relies_on("meta.partitioner_tag")
def nodes_are_tagged_as_forward_or_backward() -> None:
    """`meta["partitioner_tag"]` is "is_forward" or "is_backward" on the nodes of the joint graph.
    A node tagged "is_backward" may still move to the forward; "must_be_in_backward" prevents that.
    """
    from torch._functorch import config

    graph = captured()
    assert graph.called(aten.addmm.default, "is_forward") == graph.called(aten.addmm.default)
    assert graph.called(aten.mm.default, "is_backward") == graph.called(aten.mm.default)

    def part_of_node_tagged(tag: str) -> list[str]:
        """Return the part that computes a small number from a large tensor of the forward."""
        parts: list[str] = []

        def add_sum(joint: fx.GraphModule, _inputs: Any) -> fx.GraphModule:
            (forward,) = find(joint.graph, aten.convolution.default)
            (backward,) = find(joint.graph, aten.convolution_backward.default)
            fake = forward.meta["val"]
            with joint.graph.inserting_before(backward):
                total = joint.graph.call_function(aten.sum.default, (forward,))
                shifted = joint.graph.call_function(aten.sub.Tensor, (backward.args[0], total))
            with fake.fake_mode:
                total.meta.update(val=fake.sum(), partitioner_tag=tag)
                shifted.meta.update(val=torch.empty_like(fake), partitioner_tag="is_backward")
            backward.args = (shifted, *backward.args[1:])
            joint.recompile()
            return joint

        def note(kind: str, part: fx.GraphModule) -> None:
            parts.extend([kind] * len(find(part.graph, aten.sum.default)))

        with config.patch(joint_custom_pass=add_sum):
            capture(lambda gm, inputs: aot(gm, inputs, note))
        return parts

    assert part_of_node_tagged("is_backward") == ["forward"]
    assert part_of_node_tagged("must_be_in_backward") == ["backward"]


@relies_on("aten.convolution_backward")
def the_backward_of_a_convolution_is_one_operator() -> None:
    """Its arguments are, in this order: grad_output, input, weight, bias sizes, stride, padding,
    dilation, transposed, output padding, groups, output mask. It returns a tuple of three.
    """
    names = " ".join(
        argument.name for argument in aten.convolution_backward.default._schema.arguments
    )
    assert names == (
        "grad_output input weight bias_sizes stride padding dilation transposed output_padding"
        " groups output_mask"
    )
    (node,) = captured().called(aten.convolution_backward.default)
    assert len(node.args) == 11
    assert node.args[-1] == [False, True, True]


@relies_on("._unsafe_view")
def views_of_products_are_this_operator() -> None:
    """A linear call on more than two dimensions is a product and a view of it. The view is
    `aten.view` or `aten._unsafe_view`.
    """
    seen: set[object] = set()
    model = nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(0, (2, 3)), nn.Linear(5, 5, bias=False))
    capture(
        lambda gm, x: aot(gm, x, lambda _, part: seen.update(n.target for n in part.graph.nodes)),
        model,
    )
    assert aten.mm.default in seen
    assert seen & {aten.view.default, aten._unsafe_view.default}


@relies_on("torch._ops.OpOverload", "._schema")
def operators_say_whether_they_write() -> None:
    """The target of a node that calls an operator is an `OpOverload`. Its `_schema.is_mutable`
    says whether the operator writes to an operand.
    """
    from torch._ops import OpOverload

    assert isinstance(captured().called(aten.addmm.default)[0].target, OpOverload)
    assert aten.copy_.default._schema.is_mutable
    assert not aten.add.Tensor._schema.is_mutable


# Tracing a replacement.


@relies_on(
    "torch.fx.experimental.proxy_tensor.make_fx",
    "torch._dispatch.python.enable_python_dispatcher",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch._check",
    ".allow_scalar_outputs",
)
def a_function_of_fake_tensors_can_be_traced() -> None:
    """In a fake mode and the Python dispatcher, `make_fx(fn, table, tracing_mode="real")` returns a
    graph whose nodes carry `meta["val"]`. With `allow_scalar_outputs`, `.item()` returns an
    unbacked symbol that sizes may depend on. Torch then knows what `torch._check` states about it.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    mode.allow_scalar_outputs = True
    values = [
        mode.from_tensor(t, static_shapes=True) for t in (torch.ones(8, 5), torch.tensor([2]))
    ]

    def fn(x: Tensor, counts: Tensor) -> Tensor:
        k = cast(int, counts[0].item())
        torch._check(k >= 2)
        torch._check(k <= 8)
        assert 2 <= k <= 8
        return x[x.abs().mean(1).topk(k).indices]

    with mode, enable_python_dispatcher():
        traced = make_fx(fn, {}, tracing_mode="real")(*values)
    calls = [n for n in traced.graph.nodes if n.op == "call_function"]
    assert all("val" in n.meta for n in calls)
    (item,) = [n for n in calls if n.target is aten._local_scalar_dense.default]
    assert item.meta["unbacked_bindings"]
    assert isinstance(calls[-1].meta["val"].shape[0], torch.SymInt)


@relies_on("torch._subclasses.fake_tensor.FakeCopyMode", "torch._subclasses.fake_tensor.FakeTensor")
def modules_can_be_copied_to_fake_tensors() -> None:
    """`copy.deepcopy` under `FakeCopyMode(mode)` returns a module whose parameters are fake
    tensors; tied parameters stay tied. A mode with `allow_non_fake_inputs` also takes real tensors.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.Linear(5, 5))
    model[1].weight = layer.weight
    with FakeCopyMode(mode):
        copied = copy.deepcopy(model)
    assert isinstance(copied[0].weight, nn.Parameter)
    assert copied[1].weight is copied[0].weight
    assert all(isinstance(p, FakeTensor) for p in copied.parameters())
    with mode:
        assert isinstance(copied(torch.ones(2, 5)), FakeTensor)


@relies_on(".hooked")
def an_optimizer_whose_steps_run_hooks_can_be_told() -> None:
    """`Optimizer.__init__` wraps `step` of the class, and then `step.hooked` is true. A subclass
    that does not call it accepts hooks, and never runs them.
    """

    class Wrapping(torch.optim.Optimizer):
        def __init__(self) -> None:
            self._optimizer_step_post_hooks = OrderedDict()

        def step(self, closure: Any = None) -> None:
            pass

    assert torch.optim.SGD([nn.Parameter(torch.ones(2))]).step.hooked
    wrapping, ran = Wrapping(), []
    wrapping.register_step_post_hook(lambda *_args: ran.append(1))
    wrapping.step()
    assert not ran
    assert not getattr(wrapping.step, "hooked", False)


@relies_on(
    "torch.fx.experimental.proxy_tensor.get_proxy_mode",
    "torch._C._functorch.peek_interpreter_stack",
)
def tracing_and_transforms_can_be_told() -> None:
    """`get_proxy_mode()` is None unless `make_fx` or torch.export records operators.
    `peek_interpreter_stack()` is None outside of the transforms of torch.func.
    """
    from torch._C._functorch import peek_interpreter_stack
    from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

    seen: list[tuple[bool, bool]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((get_proxy_mode() is not None, peek_interpreter_stack() is not None))
        return x.sum()

    look(torch.ones(2))
    make_fx(look)(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    assert seen == [(False, False), (True, False), (False, True), (False, True)]


@relies_on("torch.utils._python_dispatch._disable_current_modes")
def modes_can_be_left_for_a_while() -> None:
    """Within `_disable_current_modes` operators run on real tensors, whatever modes are active."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import _disable_current_modes

    with FakeTensorMode():
        assert isinstance(torch.ones(2), FakeTensor)
        with _disable_current_modes():
            assert torch.ones(2).sum().item() == 2


@relies_on(
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_unflatten",
)
def containers_can_be_flattened_and_mapped() -> None:
    """`tree_leaves` and `tree_map` go through lists, tuples and dicts. `tree_unflatten` puts
    together what `tree_flatten` took apart.
    """
    from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

    assert tree_leaves(((1, [2]), {"a": 3})) == [1, 2, 3]
    assert tree_unflatten(*tree_flatten(((1, [2]), {"a": 3}))) == ((1, [2]), {"a": 3})
    assert tree_map(lambda n: n + 1, ((1, [2]), {"a": 3})) == ((2, [3]), {"a": 4})


@relies_on("._parameters", "._buffers", "._modules")
def modules_hold_their_tensors_in_tables() -> None:
    """`_parameters`, `_buffers` and `_modules` are dicts by name, and changing them is enough."""
    layer = nn.BatchNorm1d(2)
    assert set(layer._parameters) == {"weight", "bias"}
    assert "running_mean" in layer._buffers
    assert nn.Sequential(layer)._modules == {"0": layer}
    layer._parameters["weight"] = nn.Parameter(torch.zeros(2))
    assert torch.equal(layer.weight, torch.zeros(2))


@relies_on("._call_impl", "._compiled_call_impl")
def a_module_may_be_compiled_in_place() -> None:
    """If `_compiled_call_impl` of a module is set, a call of the module calls it instead of
    `_call_impl`, which runs hooks and `forward`.
    """
    layer = nn.Linear(5, 5)
    x = torch.ones(2, 5)
    expected = layer(x)
    assert torch.equal(layer._call_impl(x), expected)
    layer._compiled_call_impl = lambda x: layer._call_impl(x) + 1
    assert torch.equal(layer(x), expected + 1)


# Several ranks.


@relies_on(
    "torch.distributed._functional_collectives",
    "torch.ops._c10d_functional.all_reduce",
    "torch.ops._c10d_functional.broadcast",
    "torch.ops._c10d_functional.wait_tensor",
)
def collectives_can_be_traced() -> None:
    """After the import of `_functional_collectives`, `all_reduce(x, "sum", group name)`,
    `broadcast(x, source, group name)` and `wait_tensor(x)` return fake tensors like x. The first
    two do not write to x.
    """
    import torch.distributed._functional_collectives
    from torch._subclasses.fake_tensor import FakeTensorMode

    operators = torch.ops._c10d_functional
    with FakeTensorMode():
        x = torch.ones(3, 5)
        for result in (
            operators.all_reduce(x, "sum", "some group"),
            operators.broadcast(x, 0, "some group"),
            operators.wait_tensor(x),
        ):
            assert (result.shape, result.dtype) == (x.shape, x.dtype)
    for operator in (operators.all_reduce, operators.broadcast):
        assert not operator.default._schema.is_mutable


# Inductor.


@relies_on(
    "torch._inductor.compile_fx.compile_fx",
    "torch._inductor.compile_fx.compile_fx_inner",
    "torch._inductor.config.joint_custom_pre_pass",
    "torch._inductor.custom_graph_pass.CustomGraphPass",
)
def inductor_takes_a_pass_on_the_joint_graph() -> None:
    """`compile_fx(gm, inputs, inner, config_patches=...)` uses `inner` in place of
    `compile_fx_inner`. It compiles the forward and, later and outside of the backend, the backward.
    The patches hold in both. `joint_custom_pre_pass`, None by default, is a `CustomGraphPass` that
    is called with the joint graph. `force_disable_caches` turns the caches off.
    """
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.custom_graph_pass import CustomGraphPass

    seen: list[str] = []

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            assert graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
            seen.append("joint")

        def uuid(self) -> str:
            return "canary"

    def inner(gm: fx.GraphModule, *_args: Any, **_kwargs: Any) -> Any:
        assert isinstance(config.joint_custom_pre_pass, Pass)
        assert config.force_disable_caches
        seen.append("part")
        return make_boxed_func(gm.forward)

    def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        patches = {"joint_custom_pre_pass": Pass(), "force_disable_caches": True}
        compiled = compile_fx(gm, inputs, inner, config_patches=patches)
        seen.append("compiled")
        return compiled

    assert config.joint_custom_pre_pass is None
    assert callable(compile_fx_inner)
    capture(compile_graph)
    assert seen == ["joint", "part", "compiled", "part"]


@relies_on("torch._inductor.pattern_matcher.stable_topological_sort")
def graphs_can_be_sorted() -> None:
    """`stable_topological_sort(graph)` moves nodes, in place, after the nodes that they use."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.relu, (x,))
    second = graph.call_function(torch.relu, (x,))
    graph.output(first)
    first.args = (second,)
    stable_topological_sort(graph)
    graph.lint()
    assert [n.op for n in graph.nodes][-1] == "output"


@relies_on("torch._inductor.decomposition.select_decomp_table")
def inductor_has_a_table_of_decompositions() -> None:
    """`select_decomp_table()` is the table, operator -> function, with which Inductor traces joint
    graphs. It does not decompose convolutions, products and `topk`.
    """
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    assert aten.native_batch_norm_backward.default in table
    assert aten.topk.default not in table
    assert aten.index_put.default not in table


@relies_on("torch._inductor.list_mode_options", "torch._inductor.config.get_config_copy")
def modes_of_inductor_are_options() -> None:
    """`list_mode_options(mode, dynamic)` returns the configuration that a mode of `torch.compile`
    stands for. `get_config_copy()` has every valid option name.
    """
    from torch._inductor import config, list_mode_options

    assert list_mode_options("reduce-overhead", None) == {"triton.cudagraphs": True}
    assert list_mode_options("default", None) == {}
    names = {"triton.cudagraphs", "joint_custom_pre_pass", "max_autotune"}
    assert names <= set(config.get_config_copy())


@relies_on("torch._inductor.runtime.cache_dir_utils.cache_dir")
def the_compile_cache_lies_where_the_environment_says() -> None:
    """`cache_dir()` returns the value that `TORCHINDUCTOR_CACHE_DIR` has at the call."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert cache_dir() == os.environ["TORCHINDUCTOR_CACHE_DIR"]


@relies_on("torch._inductor.codecache.CppCodeCache")
def inductor_compiles_our_cpp() -> None:
    """`CppCodeCache.load(source)` returns a library with OpenMP, for the machine's vector size."""
    from torch._inductor.codecache import CppCodeCache

    source = """
        #include <omp.h>
        extern "C" long largest_team(long threads) {
          long size = 0;
          #pragma omp parallel num_threads(threads) reduction(max : size)
          size = omp_get_num_threads();
          return size;
        }
    """
    assert CppCodeCache.load(source).largest_team(2) == 2


@relies_on("torch.cpu._is_avx512_bf16_supported")
def processors_that_compute_in_bfloat16_are_known() -> None:
    """`_is_avx512_bf16_supported()` says whether the processor has instructions for bfloat16."""
    found = torch.cpu._is_avx512_bf16_supported()
    assert isinstance(found, bool)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        assert found == ("avx512_bf16" in cpuinfo.read_text().split())


# Elsewhere.


@relies_on(".var_to_hint_override")
def a_size_has_the_hint_that_its_environment_is_told() -> None:
    """When Inductor chooses code, it assumes that an unbacked size is
    `shape_env.var_to_hint_override[symbol]` or, without an entry, the `fallback`.
    """
    from torch._inductor.sizevars import SizeVarAllocator
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv()
    told, unknown = (environment.create_unbacked_symint().node.expr for _ in range(2))
    environment.var_to_hint_override[told] = 7
    sizes: Any = SizeVarAllocator(environment)
    # Until torch 2.11 it has another name.
    hint = getattr(sizes, "optimization_hint", None) or sizes.size_hint
    assert [hint(size, fallback=0) for size in (told, 3 * told, unknown)] == [7, 21, 0]


@relies_on("torch.fx.experimental.symbolic_shapes.statically_known_true")
def symbols_can_be_compared_without_a_guard() -> None:
    """`statically_known_true(expression)` returns a bool and adds no guard. The result is False if
    the answer depends on an unknown symbol.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

    environment = ShapeEnv()
    size = environment.create_unbacked_symint()
    torch._check(size >= 2)
    assert statically_known_true(3 == 3)
    assert statically_known_true(size >= 1)
    assert not statically_known_true(size == 7)
    assert not environment.guards


@relies_on(
    "torch._foreach_abs",
    "torch._foreach_add",
    "torch._foreach_lerp_",
    "torch._foreach_mul",
    "torch._foreach_neg",
    "torch._foreach_sign",
)
def lists_of_tensors_are_computed_with_in_one_call() -> None:
    """A `_foreach_` function does to each tensor of a list what the function of that name does.
    `_foreach_lerp_` takes a list of weights; weights 0 and 1 give the ends exactly.
    """
    xs = [torch.tensor([-2.0, 0.0]), torch.tensor([0.1])]
    signs = torch._foreach_sign(torch._foreach_abs(xs))
    assert [s.tolist() for s in signs] == [[1.0, 0.0], [1.0]]
    rest = torch._foreach_add(torch._foreach_neg(signs), 1)
    assert [r.tolist() for r in rest] == [[0.0, 1.0], [0.0]]
    now = torch._foreach_mul(xs, 3)
    torch._foreach_lerp_(now, [x + 0.1 for x in xs], rest)
    assert torch.equal(now[0], torch.tensor([-6.0, 0.1]))
    assert torch.equal(now[1], xs[1] * 3)
