"""Tracing a replacement; modules, optimizers, ranks."""

import copy
from collections import OrderedDict
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_api.canary import relies_on

aten = torch.ops.aten


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
