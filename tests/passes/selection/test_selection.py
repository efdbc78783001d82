"""Every score, selector and choice of gradients on every kind of layer, against the oracle."""

import pytest
import torch
from oracle import (
    channel_factors,
    channel_scores,
    find_factors,
    relative_error,
    scaled_gradients,
    selection_groups,
)
from ssprop_passes.selection.policy import GRADIENTS
from ssprop_passes.selection.scores import SCORES
from ssprop_passes.selection.selectors import SELECTORS
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.config import TARGETS

# name -> layer, shape of its input; all of 16 channels
LAYERS = {
    "conv2d": (lambda: nn.Conv2d(3, 16, 3), (2, 3, 6, 6)),
    "grouped": (lambda: nn.Conv2d(6, 16, 3, stride=2, groups=2), (2, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), (2, 8, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 16, 2, groups=2), (2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 16, 3, bias=False), (2, 3, 9)),
    "linear": (lambda: nn.Linear(7, 16), (2, 5, 7)),
}


class Branches(nn.Module):
    """Each kind of layer on its own input, for a single compile."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Tanh(), make(), nn.Tanh())
                for name, (make, _) in LAYERS.items()
            }
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        outputs = [branch(x) for branch, x in zip(self.branches.values(), inputs, strict=True)]
        return torch.stack([loss(output) for output in outputs]).sum()


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().sum()


def config(**options: object) -> SparsityConfig:
    return SparsityConfig(channel_multiple=1, min_channels=1, targets=TARGETS, **options)


def make_inputs(memory_format: torch.memory_format) -> list[Tensor]:
    inputs = [torch.randn(shape, dtype=torch.float64) for _, shape in LAYERS.values()]
    return [x.to(memory_format=memory_format) if x.ndim == 4 else x for x in inputs]


def check(options: dict, backend: str, memory_format: torch.memory_format) -> None:
    """Compare the gradients of one step at drop rate 0.5 with the oracle's."""
    options = {"select": "topk", "score": "mean_abs", "gradients": "both", "block": 1, **options}
    model = Branches().double()
    inputs = make_inputs(memory_format)
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=config(**options), backend=backend)
    for x in inputs:
        x.requires_grad_()
    compiled(*inputs).backward()
    made = report(compiled)
    assert {site.reason for site in made.sites} == {""}
    assert made.saved_flops == made.backward_flops // (2 if options["gradients"] == "both" else 4)
    for (name, branch), x in zip(model.branches.items(), inputs, strict=True):
        actual = {key: p.grad for key, p in branch.named_parameters()}
        actual["inputs"] = x.grad
        expected = oracle(branch, x, actual, **options)
        assert relative_error(actual, expected) < 1e-10, name


def oracle(
    branch: nn.Module,
    x: Tensor,
    actual: dict[str, Tensor],
    *,
    select: str,
    score: str,
    gradients: str,
    block: int,
) -> dict[str, Tensor]:
    layer = branch[1]
    groups = selection_groups(layer)
    k = 8 // groups
    dense, grad_output = scaled_gradients(branch, layer, x, loss, torch.ones(16))
    kept = None
    if select != "topk":
        # A sparse gradient shows which channels a random selector kept.
        key = "inputs" if gradients == "input" else "1.weight"
        shares = [scaled_gradients(branch, layer, x, loss, one)[0][key] for one in torch.eye(16)]
        kept = find_factors(shares, actual[key]).abs() > 1e-6
        assert kept.view(groups, -1).sum(1).tolist() == [k] * groups
        assert torch.equal(kept.view(-1, block).all(1), kept.view(-1, block).any(1))
    scores = channel_scores(score, grad_output, layer)
    factors = channel_factors(select, scores, k, groups, block, kept)
    sparse = scaled_gradients(branch, layer, x, loss, factors)[0]
    is_sparse = {"inputs": gradients != "weight"}
    return {
        key: sparse[key] if is_sparse.get(key, gradients != "input") else dense[key]
        for key in dense
    }


# The quick tests make only one gradient sparse once per selector. The other such cases are slow
# tests, and so are all with blocks.
QUICK = {("topk", "l2"), ("random", "l2_weight"), ("sampled", "mean_abs")}
CASES = [
    pytest.param(
        select,
        score,
        gradients,
        block,
        marks=()
        if block == 1 and (gradients == "both" or (select, score) in QUICK)
        else pytest.mark.slow,
    )
    for select in SELECTORS
    for score in SCORES
    for gradients in GRADIENTS
    for block in (1, 2)
]


@pytest.mark.parametrize(("select", "score", "gradients", "block"), CASES)
def test_gradients_equal_the_oracle(select: str, score: str, gradients: str, block: int) -> None:
    options = {"select": select, "score": score, "gradients": gradients, "block": block}
    check(options, "aot_eager", torch.contiguous_format)


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize(
    "memory_format",
    [pytest.param(torch.contiguous_format, marks=pytest.mark.slow), torch.channels_last],
)
def test_blocks_equal_the_oracle(select: str, memory_format: torch.memory_format) -> None:
    check({"select": select, "score": "l2", "block": 2}, "aot_eager", memory_format)


@pytest.mark.parametrize(
    "options",
    [
        {"select": "sampled", "score": "l2_weight", "block": 2},
        {"select": "sampled", "gradients": "input"},
        {"select": "random", "gradients": "weight"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_gradients_equal_the_oracle_under_inductor(options: dict) -> None:
    check(options, "inductor", torch.channels_last)
