"""freeze_dropped: weights without a gradient stay, all others move as without the hook."""

import copy

import pytest
import timm.optim
import torch
from torch import Tensor, nn

from ssprop_fx import (
    SparsityConfig,
    SparsityScheduler,
    bar,
    constant,
    freeze_dropped,
    ssprop_compile,
)
from ssprop_fx.runtime.module import SsPropModule

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd_loop": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "timm": lambda p: timm.optim.create_optimizer_v2(p, "lamb", lr=0.01, weight_decay=0.1),
}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 16, 2),
        nn.BatchNorm2d(16),
        nn.Tanh(),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.Flatten(),
        nn.Linear(16 * 25, 8),
    )


def compile_model(schedule: object = None) -> SsPropModule:
    config = SparsityConfig(channel_multiple=1, min_channels=10)
    scheduler = SparsityScheduler(schedule or constant(0.75))
    return ssprop_compile(net(), scheduler, config=config, backend="aot_eager")


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(4, 3, 6, 6)).square().mean().backward()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple, Tensor]:
    """Copies of the weights and of the optimizer's tensors."""
    found = {}
    for name, weight in model.named_parameters():
        state = {k: t for k, t in optimizer.state[weight].items() if torch.is_tensor(t)}
        found.update({(name, key): t.detach().clone() for key, t in state.items()})
        found[name, "weight"] = weight.detach().clone()
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_has_no_gradient_stays_and_the_rest_moves_as_without(name: str) -> None:
    model = compile_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(2):
        backward(model)
        optimizer.step()
    backward(model)
    gradients = {key: p.grad.clone() for key, p in model.named_parameters()}
    before = values(model, optimizer)
    twin, state = copy.deepcopy(model._orig_mod), copy.deepcopy(optimizer.state_dict())
    handle = freeze_dropped(optimizer, model)
    optimizer.step()
    frozen = values(model, optimizer)
    handle.remove()

    other = OPTIMIZERS[name](twin.parameters())
    other.load_state_dict(state)
    for p, grad in zip(twin.parameters(), gradients.values(), strict=True):
        p.grad = grad.clone()
    other.step()
    moved = {(f"_orig_mod.{key}", what): t for (key, what), t in values(twin, other).items()}

    stayed = 0
    for key, after in frozen.items():
        takes_part = key[0] in {f"_orig_mod.{i}.{n}" for i in (0, 3) for n in ("weight", "bias")}
        if not takes_part or after.shape != gradients[key[0]].shape:
            assert torch.equal(after, moved[key]), key
            continue
        is_zero = gradients[key[0]] == 0
        assert is_zero.float().mean() > 0.7
        assert torch.equal(after, torch.where(is_zero, before[key], moved[key])), key
        stayed += int((after != moved[key]).sum())
    assert stayed > 0, "without the hook they move"


def test_dense_steps_are_what_they_were_and_a_handle_ends_it() -> None:
    model = compile_model(bar(0.75, period=2))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle = freeze_dropped(optimizer, model)
    weight = model._orig_mod[3].weight
    weights = []
    for _ in range(2):
        backward(model)
        # Dead channels: no gradient in a dense step either, but weight decay moves them.
        weight.grad[0] = 0
        weights.append(weight.detach().clone())
        optimizer.step()
        model.ssprop.scheduler.step()
    weights.append(weight.detach().clone())
    assert not torch.equal(weights[0][0], weights[1][0])
    assert torch.equal(weights[1][0], weights[2][0])
    handle.remove()
    model.ssprop.scheduler.load_state_dict({"last_step": 1})
    backward(model)
    optimizer.step()
    assert (weight != weights[2]).all(), "momentum and weight decay move all"


def test_a_step_that_a_gradient_scaler_skips_changes_nothing() -> None:
    model = compile_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    freeze_dropped(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.randn(4, 3, 6, 6)).square().mean() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, model.parameters()))


def test_mistakes_are_named() -> None:
    model = compile_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(TypeError, match=r"^optimizer must be a torch.optim.Optimizer, got dict"):
        freeze_dropped({}, model)
    with pytest.raises(TypeError, match=r"^model must come from ssprop_compile, got Sequential"):
        freeze_dropped(optimizer, net())
    with pytest.raises(ValueError, match=r"^optimizer must hold the model's parameters"):
        freeze_dropped(OPTIMIZERS["sgd"](net().parameters()), model)
