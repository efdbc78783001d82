"""What timm's optimizers do to rows of a weight that have no gradient, with `freeze_dropped` too.

`python tests/support/optimizers.py` prints the table of docs/optimizers.md.
"""

import functools
import warnings
from collections import defaultdict
from dataclasses import dataclass

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.optim import Optimizer

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, freeze_dropped, ssprop_compile

HERE = "runs"
GPU = "needs a GPU"
SECOND = "needs second derivatives, which `torch.compile` refuses"

# Large enough for the factored second moments of Adafactor.
SHAPE = (40, 48)


@dataclass(frozen=True)
class Behaviour:
    """What an optimizer does to a row of zero gradient, without weight decay.

    Attributes:
        first: whether the row moves in the first step.
        later: whether it moves in a step after others in which it had a gradient.
        shared: what state without the shape of the weight it keeps, besides numbers.
    """

    first: bool
    later: bool
    shared: tuple[str, ...]


def create(name: str, weights: list[nn.Parameter], weight_decay: float = 0.0) -> Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return create_optimizer_v2(weights, opt=name, lr=0.01, weight_decay=weight_decay)


def gradient(zero_rows: Tensor | list[int]) -> Tensor:
    found = torch.randn(SHAPE)
    found[zero_rows] = 0
    return found


def step(optimizer: Optimizer, weight: nn.Parameter, grad: Tensor) -> Tensor:
    """Take a step, and return how far it moved each row of the weight."""
    before = weight.detach().clone()
    weight.grad = grad
    # Kron compiles parts of its step, which takes long.
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    return (weight.detach() - before).abs().amax(1)


@functools.cache
def runs(name: str) -> str:
    """Whether an optimizer runs on a CPU with first derivatives, or why not."""
    try:
        optimizer = create(name, [nn.Parameter(torch.zeros(2, 2))])
    except (AssertionError, RuntimeError) as error:
        if "CUDA" not in str(error):
            raise
        return GPU
    return SECOND if getattr(optimizer, "is_second_order", False) else HERE


def behaviour(name: str) -> Behaviour:
    """Observe an optimizer."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(SHAPE))
    first = step(create(name, [weight]), weight, gradient([0]))
    weight = nn.Parameter(torch.randn(SHAPE))
    optimizer = create(name, [weight])
    for _ in range(3):
        step(optimizer, weight, gradient([]))
    later = step(optimizer, weight, gradient([0]))
    assert later[1:].all()
    # MADGRAD computes weights anew from where they began, which rounds.
    rounding = 1e-6
    moves = bool(first[0] > rounding), bool(later[0] > rounding)
    return Behaviour(*moves, shared_state(optimizer.state[weight]))


def shared_state(state: dict[str, object]) -> tuple[str, ...]:
    """Names of the state that belongs to several weights at once."""

    def is_shared(value: object) -> bool:
        if isinstance(value, list):
            return any(map(is_shared, value))
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape != SHAPE

    return tuple(key for key, value in state.items() if is_shared(value))


@functools.cache
def model() -> object:
    """A compiled model of one layer with a weight of `SHAPE`, in a sparse phase."""
    scheduler = SparsityScheduler(constant(0.8))
    config = SparsityConfig(channel_multiple=1, min_channels=1)
    return ssprop_compile(nn.Linear(SHAPE[1], SHAPE[0]), scheduler, config=config)


def check_freeze(name: str) -> None:
    """Check that `freeze_dropped` leaves rows without a gradient, and their state, alone."""
    torch.manual_seed(0)
    weight = model()._orig_mod.weight
    optimizer = create(name, [weight], weight_decay=0.1)
    step(optimizer, weight, gradient([]))
    handle = freeze_dropped(optimizer, model())
    for _ in range(3):
        dropped = torch.randperm(SHAPE[0])[:30]
        state = {k: v.clone() for k, v in of_weight(optimizer, weight).items()}
        moved = step(optimizer, weight, gradient(dropped))
        assert sorted((moved == 0).nonzero()[:, 0].tolist()) == sorted(dropped.tolist()), name
        for key, value in of_weight(optimizer, weight).items():
            assert torch.equal(value[dropped], state[key][dropped]), (name, key)
    handle.remove()


def of_weight(optimizer: Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state[weight].items()
    return {k: v for k, v in state if isinstance(v, Tensor) and v.shape == weight.shape}


def table() -> str:
    """Return the table of docs/optimizers.md."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    yes = {True: "moves", False: "stays"}
    for name in list_optimizers():
        if runs(name) == HERE:
            seen = behaviour(name)
            shared = ", ".join(f"`{key}`" for key in seen.shared) or "none"
            groups[yes[seen.first], yes[seen.later], shared].append(name)
    lines = [
        "| in its first step | after steps with a gradient | shared state | optimizers |",
        "|---|---|---|---|",
    ]
    for key, names in sorted(groups.items(), key=lambda group: (group[0][:2], -len(group[1]))):
        lines.append(f"| {' | '.join(key)} | {', '.join(names)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
