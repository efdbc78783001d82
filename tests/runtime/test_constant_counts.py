"""Constant keep counts: when they are used, and that they do not change the gradients."""

import copy

import pytest
import torch
from blocks import Block
from graphs import sparse_runs
from layers import EXACT, LAYERS, everywhere, loss
from oracle import gradients, oracle_gradients, relative_error
from ssprop_passes.errors import SsPropCompileError
from torch import nn

from ssprop_fx import (
    SparsityConfig,
    SparsityScheduler,
    bar,
    constant,
    cosine,
    join,
    report,
    ssprop_compile,
    warmup,
)
from ssprop_fx.config import TARGETS

pytestmark = pytest.mark.specialize


def exact(**options: object) -> SparsityConfig:
    return SparsityConfig(channel_multiple=1, min_channels=1, targets=TARGETS, **options)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_equal_the_oracle(name: str) -> None:
    make, shape = LAYERS[name]
    model = nn.Sequential(nn.Tanh(), make(), nn.Tanh()).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.7, everywhere, loss)
    scheduler = SparsityScheduler(constant(0.7))
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend="aot_eager")
    loss(compiled(x.requires_grad_())).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    assert report(compiled).specialized
    assert "constants of the graph" in str(report(compiled))


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1)
    ).double()


@pytest.mark.parametrize(
    "options", [{}, {"memory": 0.5}, {"select": "sampled", "block": 2}], ids=str
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_equal_those_read_at_run_time(backend: str, options: dict) -> None:
    models = [net()]
    models.append(copy.deepcopy(models[0]))
    taken = []
    for model, specialize in zip(models, (True, False), strict=True):
        torch.manual_seed(1)
        scheduler = SparsityScheduler(join([constant(0.5), constant(0.75)], [2]))
        config = exact(specialize=specialize, **options)
        compiled = ssprop_compile(model, scheduler, config=config, backend=backend)
        for _ in range(4):
            x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
            model.zero_grad()
            loss(compiled(x)).backward()
            taken.append((report(compiled).specialized, gradients(model, x)))
            scheduler.step()
    for (constants, actual), (read, expected) in zip(taken[:4], taken[4:], strict=True):
        assert (constants, read) == (True, False)
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize(
    ("schedule", "specialize", "is_constant"),
    [
        (bar(0.5, period=2, dense_fraction=0), "auto", True),
        (warmup(constant(0.5), 0), "auto", True),
        (join([constant(0.5), constant(0.6)], [9]), "auto", True),
        (join([constant(0.5), constant(0.6), constant(0.7)], [5, 9]), "auto", False),
        (join([constant(0.5), constant(0.6), constant(0.7)], [5, 9]), True, True),
        (cosine(0.5, 0.8, 9), "auto", False),
        (lambda step: 0.5, "auto", False),
        (constant(0.5), False, False),
    ],
)
def test_when_keep_counts_are_constants(schedule, specialize, is_constant: bool) -> None:
    config = exact(specialize=specialize)
    scheduler = SparsityScheduler(schedule)
    compiled = ssprop_compile(net(), scheduler, config=config, backend="aot_eager")
    loss(compiled(torch.randn(2, 3, 6, 6, dtype=torch.float64))).backward()
    assert report(compiled).specialized == is_constant


@pytest.mark.parametrize(
    ("schedule", "count"),
    [
        (cosine(0, 0.8, 9), "too many"),
        (join([constant(i / 9) for i in range(8)], range(1, 8)), "7"),
    ],
)
def test_too_many_drop_rates_are_refused(schedule, count: str) -> None:
    with pytest.raises(ValueError, match=f"at most 6, and this one has {count}"):
        ssprop_compile(net(), SparsityScheduler(schedule), config=exact(specialize=True))


def test_phases_compile_once_and_other_keep_counts_are_read_at_run_time() -> None:
    model = net()
    scheduler = SparsityScheduler(bar(0.5, period=2))
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend="aot_eager")
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(4):
        loss(compiled(x)).backward()
        scheduler.step()
    constants = compiled.ssprop.backend
    assert sparse_runs(constants) == 2
    assert len(constants.graphs) == 1
    scheduler.schedule = constant(0.75)
    scheduler.step()
    expected = oracle_gradients(model, x.detach(), 0.75, everywhere, loss)
    model.zero_grad()
    x.grad = None
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    assert not report(compiled).specialized
    assert sparse_runs(constants) == 2


@pytest.mark.parametrize("rates", [{}, {"2.first": 0.75}])
def test_layers_that_share_a_graph_have_one_keep_count_or_read_it(rates: dict) -> None:
    model = nn.Sequential(*(Block(12) for _ in range(4))).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    scheduler = SparsityScheduler(constant(0.5))
    config = exact(rates=rates)
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    loss(compiled(x)).backward()
    assert report(compiled).specialized == (not rates)
    kept = {site.name: site.kept for site in report(compiled).sites}
    assert kept["2.first"] == (3 if rates else 6)
    for name, count in kept.items():
        assert int(model.get_submodule(name).weight.grad.any(1).sum()) == count


def test_a_constant_of_another_layer_is_refused() -> None:
    model = nn.Sequential(*(Block(12) for _ in range(4)))
    config = exact(rates={"2.first": 0.75}, specialize=True)
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    with pytest.raises(SsPropCompileError, match=r"specialize=False"):
        compiled(torch.randn(4, 12))
