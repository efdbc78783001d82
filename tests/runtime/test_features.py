"""Every compiler feature in the list, with both ways to compile a model, against the oracle."""

from collections.abc import Callable

import pytest
import torch
from features import FEATURES, INLINED, RIGHT, Feature, Net, table
from graphs import small_net
from oracle import gradients, oracle_gradients, relative_error
from sources import ROOT
from ssprop_passes.errors import NoEffectWarning, SsPropCompileError
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.named_backend.plugin import ssprop

ERRORS = {
    "`BackendCompilerFailed`": torch._dynamo.exc.BackendCompilerFailed,
    "`SsPropCompileError`": SsPropCompileError,
    "`Unsupported`": torch._dynamo.exc.Unsupported,
}
ENTRIES = ("ssprop_compile", "no edit")


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().sum()


def make(entry: str, model: nn.Module, backend: str = "aot_eager", **options: object) -> nn.Module:
    if entry == "no edit":
        settings = {"schedule": "constant:rate=0.5", "backend": backend}
        settings |= {"channel_multiple": 1, "min_channels": 1}
        return torch.compile(model, backend=ssprop, options=settings, **options)
    config = SparsityConfig(channel_multiple=1, min_channels=1)
    scheduler = SparsityScheduler(constant(0.5))
    return ssprop_compile(model, scheduler, config=config, backend=backend, **options)


def step(feature: Feature, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with feature.context():
        loss(call(x)).backward()


def check(feature: Feature, entry: str, backend: str = "aot_eager") -> None:
    """Compare the gradients of two steps with the oracle's."""
    model = Net(feature.call).double()
    plain = Net().double()
    plain.load_state_dict(model.state_dict())
    call = feature.compile(lambda module, **options: make(entry, module, backend, **options), model)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)

        def takes_part(_module: nn.Module, name: str) -> bool:
            return name not in feature.dense

        expected = oracle_gradients(plain, x, 0.5, takes_part, loss)
        model.zero_grad()
        x.requires_grad_()
        if feature.sees == RIGHT or batch == 3:
            step(feature, call, x)
        else:
            with pytest.warns(NoEffectWarning, match=feature.match):
                step(feature, call, x)
        actual = {
            name.replace("_orig_mod.", ""): gradient
            for name, gradient in gradients(model, x).items()
        }
        assert relative_error(actual, expected) < 1e-10


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.text)
def test_it_works_or_says_so(feature: Feature, entry: str) -> None:
    if feature.context is INLINED and not hasattr(torch._dynamo.config, "inline_invoke_subgraph"):
        pytest.skip("torch 2.11 has no config.inline_invoke_subgraph")
    sees = feature.sees_no_edit if entry == "no edit" and feature.sees_no_edit else feature.sees
    if sees.startswith(("dense", "as without")):
        # test_plugin.py runs a script that is dense and gives the warning.
        pytest.skip("no graph reaches the no-edit backend")
    if errors := [error for name, error in ERRORS.items() if name in sees.split(",")[0]]:
        call = feature.compile(lambda module: make(entry, module), Net(feature.call))
        with pytest.raises(errors[0], match=feature.match):
            call(torch.randn(2, 3, 8, 8))
    elif entry == "no edit" and sees != RIGHT:
        with pytest.warns(NoEffectWarning, match=feature.match):
            warned_at_the_optimizer(feature)
    else:
        check(feature, entry)


def warned_at_the_optimizer(feature: Feature) -> None:
    model = Net(feature.call)
    call = feature.compile(lambda module: make("no edit", module), model)
    loss(call(torch.randn(2, 3, 8, 8))).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


UNDER_INDUCTOR = ("compiled autograd", "selective", "inline_invoke_subgraph")


@pytest.mark.slow
@pytest.mark.parametrize(
    "feature",
    [f for f in FEATURES if any(word in f.text for word in UNDER_INDUCTOR)],
    ids=lambda feature: feature.text,
)
def test_the_intricate_ones_work_under_inductor(feature: Feature) -> None:
    check(feature, "ssprop_compile", "inductor")


def test_the_table_of_the_documentation_is_the_list() -> None:
    page = ROOT / "docs" / "trust.md"
    assert table() in page.read_text(), "python tests/support/features.py prints the new table"


@pytest.mark.gpu
@pytest.mark.parametrize("entry", ENTRIES)
def test_reduce_overhead_on_a_gpu(entry: str) -> None:
    model = small_net(16).cuda()
    x = torch.randn(2, 3, 10, 10, device="cuda")
    expected = oracle_gradients(model, x, 0.5, lambda module, name: True, loss)
    options = {"mode": "reduce-overhead"} if entry == "ssprop_compile" else {}
    call = make(entry, model, "inductor", **options)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        y = x.clone().requires_grad_()
        loss(call(y)).backward()
        assert relative_error(gradients(model, y), expected) < 1e-3
