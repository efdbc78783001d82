"""The no-edit backend: what `torch.compile(model, backend="ssprop")` does, and when it steps."""

import copy
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from blocks import Block
from graphs import small_net
from no_edit import EXACT, Blocks, compiled, everywhere, kept_rows, loss, variant
from oracle import gradients, oracle_gradients, relative_error
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.named_backend.plugin import ssprop

X = torch.randn(2, 3, 10, 10)


def test_torch_knows_the_backend_by_its_name() -> None:
    assert "ssprop" in torch._dynamo.list_backends(), "install the package again"
    assert torch._dynamo.lookup_backend("ssprop") is ssprop


SCRIPT = """
import torch
from torch import nn

model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
compiled = torch.compile(model, backend="ssprop")
for _ in range(4):
    compiled(torch.randn(2, 3, 8, 8)).square().sum().backward()
    print(int((model[2].weight.grad.flatten(1).abs().sum(1) > 0).sum()))
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_script_without_a_line_of_ours_trains_sparse() -> None:
    settings = {"SSPROP_SCHEDULE": "bar:rate=0.75,period=2", "SSPROP_BACKEND": "aot_eager"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["64", "16", "64", "16"]


def test_a_script_without_any_setting_drops_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    # Half of the samples have no gradient to speak of.
    factors = torch.tensor([[1.0], [1e-7]]).repeat(8, 1)
    options = {"backend": "aot_eager"}
    net = torch.compile(model, backend="ssprop", options=options)
    (net(torch.randn(16, 8)) * factors).square().sum().backward()
    made = report(model).kept_samples
    assert made is not None
    assert made[0] <= 8
    assert made[1] == 16


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_equal_ssprop_compile_and_the_oracle(backend: str) -> None:
    model = small_net(16).double()
    x = X.double()
    expected = oracle_gradients(model, x, 0.6, everywhere, loss)
    twin = copy.deepcopy(model)
    config = SparsityConfig(channel_multiple=1, min_channels=1)
    scheduler = SparsityScheduler(constant(0.6))
    other = ssprop_compile(twin, scheduler, config=config, backend=backend)
    y = x.clone().requires_grad_()
    loss(other(y)).backward()
    x.requires_grad_()
    loss(compiled(model, "constant:rate=0.6", backend=backend)(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    assert relative_error(gradients(model, x), gradients(twin, y)) == 0


@pytest.mark.slow
def test_a_drop_rate_of_zero_equals_torch_compile_bit_for_bit() -> None:
    model = small_net(16)
    twin = copy.deepcopy(model)
    loss(compiled(model, "none", backend="inductor")(X)).backward()
    loss(torch.compile(twin)(X)).backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_blocks_between_graph_breaks_have_keep_counts_of_their_own() -> None:
    def takes_part(_module: nn.Module, name: str) -> bool:
        return name != "blocks.1.first"

    model = Blocks(nn.Identity()).double()
    x = torch.randn(4, 32, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.5, takes_part, loss)
    model_compiled = compiled(model, "constant:rate=0.5", filter_fn=takes_part)
    loss(model_compiled(x.requires_grad_())).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    reasons = {site.name: site.reason for site in report(model_compiled).sites}
    assert reasons.pop("blocks.1.first") == "filtered out by filter_fn"
    assert len(reasons) == 5
    assert not any(reasons.values())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_short_last_batch_is_sparse_and_right(backend: str) -> None:
    model = small_net(16).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model_compiled = compiled(model, "bar:rate=0.5,period=2", backend=backend)
    for step, batch in enumerate((4, 4, 3, 3, 5, 2)):
        optimizer.zero_grad()
        x = torch.randn(batch, 3, 10, 10, dtype=torch.float64)
        expected = oracle_gradients(model, x, 0.5 * (step % 2), everywhere, loss)
        loss(model_compiled(x.requires_grad_())).backward()
        assert relative_error(gradients(model, x), expected) < 1e-10
        optimizer.step()


def test_models_that_share_compiled_code_have_settings_and_slots_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dynamo compiles once for all models of a kind: guards do not distinguish their weights."""

    class Classified(nn.Module):
        def __init__(self, is_classifier: bool) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
            self.get_classifier = lambda: self.layers[0] if is_classifier else None

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    for name, value in EXACT.items():
        monkeypatch.setenv(f"SSPROP_{name.upper()}", str(value))
    x = torch.randn(4, 8, dtype=torch.float64)
    torch._dynamo.utils.counters.clear()
    for rate, is_classifier in ((0.5, False), (0.75, True), (0.25, False)):
        monkeypatch.setenv("SSPROP_SCHEDULE", f"constant:rate={rate}")
        model = Classified(is_classifier).double()

        def takes_part(_module: nn.Module, name: str, excluded: bool = is_classifier) -> bool:
            return not (excluded and name == "layers.0")

        expected = oracle_gradients(model, x, rate, takes_part, loss)
        y = x.clone().requires_grad_()
        model_compiled = torch.compile(model, backend=ssprop)
        loss(model_compiled(y)).backward()
        assert relative_error(gradients(model, y), expected) < 1e-10
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.step()
        assert variant(model).scheduler.last_step == 1
        assert len(report(model_compiled).sparse_sites) == 2 - is_classifier
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_nothing_keeps_the_model_alive() -> None:
    model = small_net(16)
    loss(compiled(model, "constant:rate=0.5")(X)).backward()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("how", ["in place", "forward", "of a layer"])
def test_other_ways_to_compile_a_model(how: str) -> None:
    model = nn.Linear(8, 16) if how == "of a layer" else Block(32)
    x = torch.randn(4, 8 if how == "of a layer" else 32)
    options = {**EXACT, "schedule": "constant:rate=0.5"}
    if how == "in place":
        model.compile(backend=ssprop, options=options)
        output = model(x)
    else:
        target = model.forward if how == "forward" else model
        output = torch.compile(target, backend=ssprop, options=options)(x)
    loss(output).backward()
    weight = next(model.parameters())
    assert kept_rows(weight) == len(weight) // 2


def test_a_function_is_refused() -> None:
    model = small_net(16)
    step = torch.compile(lambda x: model(x), backend=ssprop, options={"schedule": "none"})
    with pytest.raises(BackendCompilerFailed, match=r"compiles models: call torch\.compile"):
        step(X)


def test_inductor_gets_its_options(no_code: None) -> None:
    seen: list[object] = []
    model = small_net(16)
    options = {"backend": "inductor", "joint_custom_pre_pass": seen.append}
    loss(compiled(model, "constant:rate=0.5", **options)(X)).backward()
    assert len(seen) == 2, "a pass of the user runs on the sparse and on the dense graph"
    assert len(report(model).sparse_sites) == 2


@pytest.mark.parametrize("suppress", [False, True])
def test_a_wrong_setting_is_an_error_at_the_first_call(suppress: bool) -> None:
    model = torch.compile(small_net(16), backend=ssprop, options={"schedule": "bar:rate=0.8"})
    expected = ValueError if suppress else BackendCompilerFailed
    with (
        torch._dynamo.config.patch(suppress_errors=suppress),
        pytest.raises(expected, match=r"options\['schedule'\]: bar:rate=0.8: bar needs period="),
    ):
        model(X)


def test_a_failure_in_the_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise NotImplementedError("boom")

    monkeypatch.setattr("ssprop_passes.transforms.sparse_backward.find_state_inputs", fail)
    with pytest.raises(BackendCompilerFailed, match=r"SsPropCompileError: .*boom"):
        compiled(small_net(16), "constant:rate=0.5")(X)


def test_a_model_in_which_no_layer_takes_part_warns() -> None:
    with pytest.warns(NoEffectWarning, match="fewer than min_channels=32"):
        compiled(nn.Conv2d(3, 8, 3), "constant:rate=0.5", min_channels=32)(X)


def test_a_backend_that_dynamo_never_calls_warns() -> None:
    script = SCRIPT.replace("range(4)", "range(10)")
    settings = {"SSPROP_SCHEDULE": "none", "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "NoEffectWarning: 10 optimizer steps were dense, because Dynamo has not" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_model_inside_another_compiled_function_is_dense_and_warns(fullgraph: bool) -> None:
    outer = f"torch.compile(lambda x: inner(x) * 1, backend='aot_eager', fullgraph={fullgraph})"
    script = SCRIPT.replace("range(4)", "range(10)").replace("compiled = ", "inner = ")
    script = script.replace("for _ in", f"compiled = {outer}\nfor _ in").replace("0.01", "1e-6")
    settings = {"SSPROP_SCHEDULE": "constant:rate=0.75", "SSPROP_BACKEND": "aot_eager"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["64"] * 10
    assert "NoEffectWarning: 10 optimizer steps were dense, because Dynamo has not" in run.stderr


def test_report_of_a_model_that_was_never_compiled() -> None:
    with pytest.raises(TypeError, match=r'torch\.compile\(model, backend="ssprop"\)'):
        report(small_net(16))
