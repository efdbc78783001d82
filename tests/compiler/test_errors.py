"""Failure is loud: no error in a pass or backend, and no eager fallback, silently trains dense."""

import pytest
import torch
from graphs import small_net
from ssprop_passes.errors import NoEffectWarning, SsPropCompileError
from ssprop_passes.kernels.operators import reduced_conv_backward
from ssprop_passes.transforms import sparse_backward
from torch import Tensor, nn
from torch._dynamo.exc import SkipFrame
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils.flop_counter import FlopCounterMode

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.runtime.module import SsPropModule

X = torch.randn(2, 3, 10, 10)
aten = torch.ops.aten


def compiled_net(backend: str = "aot_eager", **kwargs: object) -> SsPropModule:
    config = SparsityConfig(channel_multiple=1, min_channels=1)
    scheduler = SparsityScheduler(constant(0.5))
    return ssprop_compile(small_net(8), scheduler, config=config, backend=backend, **kwargs)


EXCEPTIONS = [
    RuntimeError("boom"),
    IndexError("boom"),
    NotImplementedError("boom"),
    DataDependentOutputException(aten.nonzero.default),
    DynamicOutputShapeException(aten.nonzero.default),
    UnsupportedOperatorException(aten.nonzero.default),
    SkipFrame("boom"),
]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda e: type(e).__name__)
def test_an_error_in_the_pass_reaches_the_user(
    error: Exception, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(sparse_backward, "find_state_inputs", fail)
    with pytest.raises(SsPropCompileError) as caught:
        compiled_net(backend)(X)
    chain = [caught.value]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    assert error in chain


@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda e: type(e).__name__)
def test_an_error_in_the_backend_reaches_the_user(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("ssprop_fx.compiler.backend.mark_layers", fail)
    with pytest.raises(SsPropCompileError) as caught:
        compiled_net()(X)
    assert caught.value.__cause__ is error


def test_suppressed_errors_are_raised_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(sparse_backward, "find_state_inputs", fail)
    model = compiled_net()
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(SsPropCompileError):
        model(X)


def test_an_error_while_the_backward_compiles_reaches_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import graph as inductor_graph

    lower = inductor_graph.GraphLowering.call_function

    def fail(self: object, target: object, *args: object) -> object:
        if target is reduced_conv_backward:
            raise RuntimeError("boom")
        return lower(self, target, *args)

    monkeypatch.setattr(inductor_graph.GraphLowering, "call_function", fail)
    model = compiled_net("inductor")
    with pytest.raises(SsPropCompileError, match="boom"):
        model(X).sum().backward()


def test_a_compile_works_after_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("boom")

    model = compiled_net()
    with monkeypatch.context() as patch:
        patch.setattr(sparse_backward, "find_state_inputs", fail)
        with pytest.raises(SsPropCompileError):
            model(X)
    model(X).sum().backward()
    assert len(model.ssprop.graphs) == 1


def test_force_eager_warns_once() -> None:
    model = compiled_net()
    with torch.compiler.set_stance("force_eager"):
        with pytest.warns(NoEffectWarning, match="no sparse graph ran"):
            model(X)
        model(X)  # the warning is an error in these tests: once is enough


def test_a_dispatch_mode_warns() -> None:
    model = compiled_net()
    with FlopCounterMode(display=False), pytest.warns(NoEffectWarning, match="dispatch mode"):
        model(X)


def test_the_recompile_limit_warns() -> None:
    model = compiled_net(dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        model(X)
        with pytest.warns(NoEffectWarning, match="recompile limit"):
            model(X[:1])


def test_layers_that_dynamo_runs_eagerly_are_named() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.eager = nn.ModuleList([nn.Conv2d(8, 8, 1)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            torch._dynamo.graph_break()
            for block in self.eager:
                x = block(x)
                torch._dynamo.graph_break()
            return x

    scheduler = SparsityScheduler(constant(0.5))
    config = SparsityConfig(min_channels=1)
    model = ssprop_compile(Loop(), scheduler, config=config, backend="aot_eager")
    with pytest.warns(NoEffectWarning, match=r"1 layer is in no sparse graph.*: eager\.0\."):
        model(X)


def test_a_model_in_which_nothing_can_be_sparse_warns() -> None:
    class Functional(nn.Module):
        """Its convolution takes a computed weight, outside the layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.layer.weight.tanh())

    scheduler = SparsityScheduler(constant(0.5))
    config = SparsityConfig(min_channels=1)
    model = ssprop_compile(Functional(), scheduler, config=config, backend="aot_eager")
    with pytest.warns(NoEffectWarning, match="no site of the model.*owns no weight"):
        model(X)


def test_a_model_in_which_no_layer_takes_part_warns_at_once() -> None:
    with pytest.warns(NoEffectWarning, match="it has no convolution and no linear layer"):
        model = ssprop_compile(nn.BatchNorm1d(3), SparsityScheduler(constant(0.5)))
    with pytest.warns(NoEffectWarning, match="fewer than min_channels=32"):
        ssprop_compile(nn.Conv2d(3, 8, 3), SparsityScheduler(constant(0.5)))
    assert model(torch.randn(2, 3)).shape == (2, 3)


def test_a_layer_replaced_after_the_call_is_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    scheduler = SparsityScheduler(constant(0.5))
    config = SparsityConfig(min_channels=1)
    model = ssprop_compile(net, scheduler, config=config, backend="aot_eager")
    net[1] = nn.Conv2d(8, 16, 3)
    with pytest.raises(SsPropCompileError, match="changed since ssprop_compile"):
        model(X)
