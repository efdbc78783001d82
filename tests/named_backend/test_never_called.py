"""The backend names each model that it was never called for, and no other."""

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from no_edit import EXACT, compiled
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn

from ssprop_fx.named_backend import autostep
from ssprop_fx.named_backend.compiled_models import compiled_models
from ssprop_fx.named_backend.plugin import ssprop

X = torch.randn(4, 8)


class Good(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Skipping(nn.Module):
    """Skips layers by Python's random, inside a try block: Dynamo runs it eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() > 0.0:
                x = layer(x)
        return x


def train(call: Callable[[Tensor], Tensor], model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        call(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend=ssprop, options={**EXACT, "schedule": "constant:rate=0.5"})
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return compiled(model, "constant:rate=0.5")


@pytest.mark.parametrize("make", [wrapped, in_place])
def test_a_second_model_that_dynamo_runs_eagerly_is_named(
    make: Callable[[nn.Module], nn.Module],
) -> None:
    good, bad = Good(), Skipping()
    train(make(good), good, 10)
    call = make(bad)
    train(call, bad, 9)
    with pytest.warns(NoEffectWarning, match=r"^10 optimizer steps .* training step of Skipping\."):
        train(call, bad, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(call, bad, 10)  # once is enough


def test_a_model_that_is_compiled_late_is_named_later() -> None:
    bad = Skipping()
    optimizer = torch.optim.SGD(bad.parameters(), lr=0.01)

    def train(call: Callable[[Tensor], Tensor], steps: int) -> None:
        for _ in range(steps):
            call(X).square().mean().backward()
            optimizer.step()

    train(bad, 20)
    call = wrapped(bad)
    with pytest.warns(NoEffectWarning, match=r"^100 optimizer steps .* of Skipping\."):
        train(call, 80)


def test_models_that_are_not_for_this_backend_give_no_alarm() -> None:
    good, eager, other = Good(), Skipping(), Skipping()
    call, unused = wrapped(good), wrapped(Skipping())
    by_torch = torch.compile(other, backend="eager")
    everything = [good, eager, other, unused]
    optimizer = torch.optim.SGD([p for m in everything for p in m.parameters()], lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(12):
            (call(X) + eager(X) + by_torch(X)).square().mean().backward()
            optimizer.step()


def test_compiled_models_are_found_by_their_backend() -> None:
    one, two, three, other = (Good() for _ in range(4))
    held = [wrapped(one), in_place(two), torch.compile(three.forward, backend=ssprop)]
    held.append(torch.compile(other, backend="eager"))
    found = set(compiled_models("ssprop"))
    assert {one, two, three} <= found
    assert other not in found


def test_the_search_is_rare() -> None:
    assert min(autostep._LOOK_AT) == 10
    assert len([step for step in autostep._LOOK_AT if step <= 100_000]) == 5
