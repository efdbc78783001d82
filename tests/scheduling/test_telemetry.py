"""Telemetry of sparse backwards against numbers computed from dense gradients."""

import copy
import pickle

import pytest
import torch
from blocks import Block
from ssprop_passes.selection.selectors import SELECTORS
from torch import Tensor, nn

from ssprop_fx import (
    SiteTelemetry,
    SparsityConfig,
    SparsityScheduler,
    bar,
    constant,
    ssprop_compile,
)
from ssprop_fx.runtime.module import SsPropModule


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.Tanh(),
        nn.Conv2d(12, 16, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16 * 16, 20),
    )


def compile_model(
    model: nn.Module, backend: str = "aot_eager", schedule: object = None, **options: object
) -> tuple[SsPropModule, SparsityScheduler]:
    scheduler = SparsityScheduler(schedule or constant(0.5))
    options = {"telemetry": True, "channel_multiple": 1, "min_channels": 1, **options}
    config = SparsityConfig(**options)
    return ssprop_compile(model, scheduler, config=config, backend=backend), scheduler


def loss(output: Tensor) -> Tensor:
    return (output - 0.3).square().mean() + output.sin().mean()


def expected_last(model: nn.Module, x: Tensor, weight: float = 1.0) -> SiteTelemetry:
    """Expected telemetry of the last layer at drop rate 0.5; only its output gradient is dense."""
    output = model(x)
    (grad,) = torch.autograd.grad(loss(output), output)
    grad = grad.flatten(0, -2)
    scores = grad.norm(dim=0)
    kept = scores.topk(grad.shape[1] // 2).indices
    sparse = torch.zeros_like(grad).index_copy(1, kept, weight * grad[:, kept])
    return SiteTelemetry(
        kept_mass=float(scores[kept].sum() / scores.sum()),
        error=float((grad - sparse).square().sum() / grad.square().sum()),
        grad_norm=float(grad.norm()),
    )


def assert_close(actual: SiteTelemetry, expected: SiteTelemetry) -> None:
    for name in ("kept_mass", "error", "grad_norm"):
        assert getattr(actual, name) == pytest.approx(getattr(expected, name), rel=1e-4), name


def weighted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    indices = torch.topk(scores, k).indices
    return indices, torch.full_like(indices, 0.75, dtype=scores.dtype)


@pytest.mark.parametrize(
    ("backend", "select"),
    [
        ("aot_eager", "topk"),
        ("aot_eager", weighted),
        pytest.param("inductor", "topk", marks=pytest.mark.slow),
    ],
    ids=["eager", "weighted", "inductor"],
)
def test_the_numbers_are_those_of_the_gradient(backend: str, select: object) -> None:
    model = net()
    x = torch.randn(4, 3, 8, 8)
    expected = expected_last(model, x, weight=0.75 if select is weighted else 1.0)
    compiled, scheduler = compile_model(model, backend, select=select)
    assert scheduler.telemetry() == {}
    loss(compiled(x)).backward()
    told = scheduler.telemetry()
    assert set(told) == {"0", "2", "5"}
    assert_close(told["5"], expected)
    assert all(0.5 < site.kept_mass < 1 for site in told.values())
    assert compiled.ssprop.telemetry() == told


@pytest.mark.parametrize("select", SELECTORS)
def test_telemetry_changes_no_gradient(select: str) -> None:
    model, x = net(), torch.randn(4, 3, 8, 8)
    found = []
    for telemetry in (False, True):
        twin = copy.deepcopy(model)
        compiled, scheduler = compile_model(twin, select=select, memory=0.0, telemetry=telemetry)
        torch.manual_seed(3)
        loss(compiled(x)).backward()
        found.append([p.grad for p in twin.parameters()])
        assert bool(scheduler.telemetry()) == telemetry
    assert all(map(torch.equal, *found))


def test_of_two_forwards_before_two_backwards_the_last_backward_tells() -> None:
    model = net()
    first, second = torch.randn(2, 4, 3, 8, 8)
    compiled, scheduler = compile_model(model, memory=0.5)
    losses = [loss(compiled(first)), loss(compiled(second))]
    losses[1].backward()
    assert_close(scheduler.telemetry()["5"], expected_last(model, second))
    # The memory, from which channels are also chosen, is no longer empty.
    compiled.ssprop.memory.reset()
    losses[0].backward()
    assert scheduler.telemetry()["5"].grad_norm != expected_last(model, second).grad_norm


def test_an_overflow_is_missing_and_a_zero_gradient_loses_nothing() -> None:
    model, x = net(), torch.randn(4, 3, 8, 8)
    compiled, scheduler = compile_model(model)
    (loss(compiled(x)) * float("inf")).backward()
    assert scheduler.telemetry() == {}
    (loss(compiled(x)) * 0).backward()
    assert scheduler.telemetry()["5"] == SiteTelemetry(kept_mass=1, error=0, grad_norm=0)


def test_half_precision_gradients_are_summed_in_float32() -> None:
    compiled, scheduler = compile_model(net())
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(torch.randn(4, 3, 8, 8))
    loss(output.float()).backward()
    assert all(0.5 < site.kept_mass < 1 for site in scheduler.telemetry().values())


def test_blocks_behind_a_graph_break_tell_of_themselves() -> None:
    model = nn.Sequential(*[Block(16) for _ in range(3)])
    compiled, scheduler = compile_model(model)
    x = torch.randn(5, 16)
    loss(compiled(x)).backward()
    told = scheduler.telemetry()
    assert set(told) == {f"{i}.{name}" for i in range(3) for name in ("first", "second")}
    assert len(compiled.ssprop.backend.instances) < 6, "one graph serves several blocks"
    assert len({site.grad_norm for site in told.values()}) == 6

    # The block in the middle, with everything after it dense.
    scheduler.step()
    with torch.no_grad():
        inner = model[0](x)
    middle = nn.Sequential(copy.deepcopy(model[1]))
    compiled, scheduler = compile_model(middle)
    loss(compiled(inner)).backward()
    output = middle[0].first(inner).tanh().requires_grad_()
    product = middle[0].second(output)
    (grad,) = torch.autograd.grad(loss(product.tanh()), product)
    assert scheduler.telemetry()["0.second"].grad_norm == pytest.approx(
        float(grad.norm()), rel=1e-4
    )


def test_another_batch_size_tells_last_and_dense_steps_nothing() -> None:
    model = net()
    compiled, scheduler = compile_model(model, schedule=bar(0.5, period=4, dense_fraction=0.25))
    scheduler.step()
    for size in (4, 6, 4):
        x = torch.randn(size, 3, 8, 8)
        model.zero_grad()
        loss(compiled(x)).backward()
        assert_close(scheduler.telemetry()["5"], expected_last(model, x))
        scheduler.step()
    assert scheduler.drop_rate == 0
    loss(compiled(torch.randn(4, 3, 8, 8))).backward()
    assert_close(scheduler.telemetry()["5"], expected_last(model, x))


def test_copies_of_a_model_share_what_is_told() -> None:
    model, x = net(), torch.randn(4, 3, 8, 8)
    compiled, scheduler = compile_model(model)
    loss(compiled(x)).backward()
    duplicate = copy.deepcopy(compiled)
    assert scheduler.telemetry()["5"].grad_norm > 0, "a copy that has not run hides nothing"
    loss(duplicate(2 * x)).backward()
    assert_close(scheduler.telemetry()["5"], expected_last(model, 2 * x))
    other = pickle.loads(pickle.dumps(compiled))
    assert other.ssprop.telemetry() == {}


def test_a_switch_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="telemetry must be True or False, got 1"):
        SparsityConfig(telemetry=1)


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for() -> None:
    model, x = net().cuda(), torch.randn(4, 3, 8, 8, device="cuda")
    compiled, scheduler = compile_model(model, "inductor")
    for _ in range(3):
        loss(compiled(x)).backward()
        scheduler.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            loss(compiled(x)).backward()
            scheduler.step()
            told = scheduler.telemetry()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(told["5"], expected_last(model, x))
