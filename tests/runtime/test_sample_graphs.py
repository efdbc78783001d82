"""`axis="sample"` in several graphs and under the backend `ssprop`: one choice for all of them."""

import copy
from typing import Any

import pytest
import torch
from oracle import relative_error
from sample_models import (
    BATCH,
    KEPT,
    Broken,
    Net,
    check,
    compile_net,
    expected,
    found,
    images,
    loss,
)
from sample_oracle import kept_gradients
from ssprop_passes.errors import SsPropCompileError
from torch import Tensor

from ssprop_fx import constant

pytestmark = pytest.mark.filterwarnings("error::ssprop_passes.errors.NoEffectWarning")


@pytest.mark.parametrize("saved", ["all", "kept"])
def test_a_graph_break(saved: str) -> None:
    model = Broken().double()
    check(model, compile_net(model, config={"saved": saved}), images())


def test_named_backend() -> None:
    model, x = Net().double(), images()
    want = expected(model, x)
    options = {"schedule": constant(0.5), "axis": "sample", "backend": "aot_eager"}
    compiled = torch.compile(model, backend="ssprop", options=options)
    loss(compiled(x)).backward()
    assert relative_error(found(compiled), want) < 1e-9


class Eager(Net):
    """Eager code between two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(squashed(self.features(x)))


@torch.compiler.disable
def squashed(x: Tensor) -> Tensor:
    return torch.tanh(x)


@pytest.mark.parametrize("kind", [Broken, Eager])
def test_graphs_of_the_named_backend_share_one_choice(kind: type[Net]) -> None:
    model, x = kind().double(), images().requires_grad_()
    options = {
        "schedule": constant(0.5),
        "axis": "sample",
        "select": "random",
        "backend": "aot_eager",
    }
    compiled = torch.compile(model, backend="ssprop", options=options)
    loss(compiled(x)).backward()
    assert x.grad is not None
    kept = x.grad.flatten(1).any(1)
    assert kept.sum() == KEPT
    got = found(compiled)
    want = kept_gradients(copy.deepcopy(model), (x.detach(),), loss, lambda g: kept.double(), BATCH)
    assert relative_error(got, want) < 1e-9


@pytest.mark.parametrize("api", ["ssprop_compile", "named backend"])
def test_code_between_graphs_that_mixes_samples_is_refused(api: str) -> None:
    class Centered(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(centered(self.features(x)))

    @torch.compiler.disable
    def centered(x: Tensor) -> Tensor:
        return x - x.mean(0)

    model, x = Centered().double(), images()
    options = {"schedule": constant(0.5), "axis": "sample", "backend": "aot_eager"}
    compiled = (
        compile_net(model)
        if api == "ssprop_compile"
        else torch.compile(model, backend="ssprop", options=options)
    )
    with pytest.raises(SsPropCompileError, match="mixes samples"):
        loss(compiled(x)).backward()


def test_a_loss_of_two_graphs_of_the_named_backend_is_refused() -> None:
    """The first backward chooses, so gradients of an earlier graph's outputs have no weights."""

    class Auxiliary(Net):
        def forward(self, x: Tensor) -> Any:
            features = self.features(x)
            torch._dynamo.graph_break()
            return self.head(torch.tanh(features)), features

    model, x = Auxiliary().double(), images()
    check(model, compile_net(model), x)
    options = {"schedule": constant(0.5), "axis": "sample", "backend": "aot_eager"}
    compiled = torch.compile(model, backend="ssprop", options=options)
    with pytest.raises(SsPropCompileError, match="before a graph break"):
        loss(compiled(x)).backward()
