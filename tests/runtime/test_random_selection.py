"""Random numbers in a compiled backward: they follow the seed, and are new each time."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.compiler.backend import BACKENDS
from ssprop_fx.runtime.module import SsPropModule


class Net(nn.Module):
    """Dropout inside and outside an activation checkpoint; `last` gets its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.last = nn.Linear(16, 16, bias=False)
        nn.init.eye_(self.last.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.first(x), 0.25)
        return checkpoint(self._rest, x, use_reentrant=False)

    def _rest(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(x.tanh(), 0.5))


def compiled_net(select: str, backend: str) -> SsPropModule:
    config = SparsityConfig(channel_multiple=1, min_channels=1, select=select)
    return ssprop_compile(Net(), SparsityScheduler(constant(0.75)), config=config, backend=backend)


def step(model: SsPropModule, x: Tensor, seed: int | None = None) -> list[Tensor]:
    if seed is not None:
        torch.manual_seed(seed)
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def kept(gradient: Tensor) -> list[int]:
    return gradient.any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("select", "backend"),
    [
        ("random", "aot_eager"),
        pytest.param("random", "inductor", marks=pytest.mark.slow),
        *[("sampled", backend) for backend in BACKENDS],
    ],
)
def test_numbers_are_those_of_the_seed_and_new_in_each_step(select: str, backend: str) -> None:
    model, x = compiled_net(select, backend), torch.randn(64, 16)
    first, *others = [step(model, x, seed) for seed in (1, 1, 2, None, None)]
    assert equal(first, others[0])
    for index, one in enumerate([first, *others[1:]]):
        assert not any(equal(one, other) for other in others[1:][index:])
        assert len(kept(one[2])) == 4
    # A process that compiles later, from the cache or not, draws the same numbers.
    torch._dynamo.reset()
    again = compiled_net(select, backend)
    again.load_state_dict(model.state_dict())
    assert equal(step(again, x, 1), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_backward_has_its_own_and_recomputed_dropout_is_that_of_the_forward(
    backend: str,
) -> None:
    model, x = compiled_net("random", backend), torch.randn(64, 16)
    outputs = [model(x) for _ in range(4)]
    chosen = set()
    for output in reversed(outputs):
        (gradient,) = torch.autograd.grad(output.sum(), model.last.weight)
        rows = kept(gradient)
        assert len(rows) == 4
        chosen.add(tuple(rows))
        # grad_output is 1, and the weight is the unit matrix.
        torch.testing.assert_close(gradient[rows], output.detach().sum(0).expand(4, -1))
    assert len(chosen) > 1
