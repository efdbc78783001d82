"""Drop rates by layer name, and blocks: slots, keep counts, predictions and real steps."""

import pytest
import torch
from oracle import SMALLEST, gradients, oracle_gradients, relative_error
from torch import nn

from ssprop_fx import (
    SparsityConfig,
    SparsityScheduler,
    bar,
    constant,
    inspect_sites,
    report,
    ssprop_compile,
)
from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.scheduling.keep_counts import keep_count


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh())
        self.layer1 = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Tanh())
        self.layer2 = nn.Sequential(nn.Conv2d(32, 40, 1), nn.Conv2d(40, 40, 1))
        self.fc = nn.Linear(40, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def config(**options: object) -> SparsityConfig:
    return SparsityConfig(**{"channel_multiple": 1, "min_channels": 1, **options})


def test_the_first_pattern_that_matches_counts() -> None:
    rates = {"stem.*": 0, "layer2.1": 0.25, "layer2.*": 0.9}
    table = find_slots(Net(), config(rates=rates))
    assert [(slot.index, slot.name) for slot in table.slots] == [
        (0, "layer1.0"),
        (1, "layer2.0"),
        (2, "layer2.1"),
        (3, "fc"),
    ]
    assert table.rates == {"layer2.0": 0.9, "layer2.1": 0.25}
    assert table.excluded == {"stem.0": "its drop rate is 0 in rates"}


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"layer3.*": 0.5}, "the pattern 'layer3.*', which matches no convolution or linear layer"),
        ({"*": 0.5, "layer1": 0}, "the pattern 'layer1', which matches no convolution or linear"),
        ({"layer*": 0.5, "layer2.*": 0.9}, "'layer2.*' after others that match all of its layers"),
    ],
)
def test_a_pattern_without_a_layer_is_an_error(rates: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r"^rates has the pattern") as caught:
        ssprop_compile(Net(), SparsityScheduler(constant(0.5)), config=config(rates=rates))
    assert message in str(caught.value)


def test_a_rate_stands_in_place_of_the_schedules_but_in_dense_phases() -> None:
    scheduler = SparsityScheduler(bar(0.5, period=2))
    counts = scheduler.register([40, 40], multiple=1, rates=[None, 0.75])
    assert counts.tensor.tolist() == [40, 40]
    scheduler.step()
    assert counts.tensor.tolist() == [20, 10]
    scheduler.schedule = constant(0.875)
    scheduler.step()
    assert counts.tensor.tolist() == [5, 10]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"channels": 64, "drop_rate": 0.8, "block": 4}, 12),  # 12.8
        ({"channels": 64, "drop_rate": 0.8, "block": 8}, 16),
        ({"channels": 64, "drop_rate": 0.99, "block": 8}, 8),
        ({"channels": 64, "drop_rate": 0.8, "multiple": 16, "block": 8}, 16),
        ({"channels": 96, "drop_rate": 0.6, "multiple": 16, "block": 12}, 48),  # steps of 48
        ({"channels": 96, "drop_rate": 0.6, "multiple": 16, "groups": 4, "block": 6}, 12),
        ({"channels": 24, "drop_rate": 0.0, "block": 8}, 24),
    ],
)
def test_keep_counts_are_multiples_of_the_block(arguments: dict, expected: int) -> None:
    assert keep_count(**arguments) == max(expected, SMALLEST * arguments["block"])


def test_layers_that_blocks_do_not_divide_stay_dense() -> None:
    model = nn.Sequential(nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 1, groups=2), nn.Conv2d(24, 20, 1))
    table = find_slots(model, config(block=8))
    assert [slot.name for slot in table.slots] == ["0"]
    assert table.excluded == {
        "1": "its channels of a group are no multiple of block=8",
        "2": "its channels are no multiple of block=8",
    }


OPTIONS = [
    {"rates": {"stem.*": 0, "layer2.*": 0.75}},
    {"gradients": "weight"},
    {"gradients": "input", "rates": {"layer2.1": 0.9}},
    {"block": 4, "min_channels": 32},
    {"block": 5, "gradients": "input", "channel_multiple": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_predicted_is_what_a_step_does(options: dict) -> None:
    model, chosen = Net(), config(**options)
    inspection = inspect_sites(model, torch.empty(2, 3, 8, 8), config=chosen)
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=chosen, backend="aot_eager")
    compiled(torch.randn(2, 3, 8, 8)).square().sum().backward()
    actual = report(compiled)
    predicted = [
        (site.name, inspection.kept_at(site, 0.5), site.sparse_flops, site.reason)
        for site in inspection.sites
    ]
    assert predicted == [
        (site.name, site.kept, site.sparse_flops, site.reason) for site in actual.sites
    ]
    assert inspection.saved_at(0.5) == actual.saved_flops / actual.backward_flops > 0
    assert inspection.saved_at(0) == 0
    rows = {
        name: int(module.weight.grad.flatten(1).any(1).sum())
        for name, module in model.named_modules()
        if hasattr(module, "weight")
    }
    if chosen.gradients != "input":
        assert rows == {site.name: site.kept for site in actual.sites}


def test_a_share_of_the_flops_is_that_of_the_sparse_gradients() -> None:
    model = nn.Sequential(nn.Conv2d(4, 32, 1), nn.Conv2d(32, 32, 1))
    both, weight, input_ = (
        inspect_sites(model, torch.empty(1, 4, 4, 4), config=config(gradients=gradients))
        for gradients in ("both", "weight", "input")
    )
    # The first layer computes no input gradient: all its products are for the weight gradient.
    per_gradient = {"0": 2 * 16 * 32 * 4, "1": 2 * 16 * 32 * 32}
    total = per_gradient["0"] + 2 * per_gradient["1"]
    assert both.backward_flops == weight.backward_flops == input_.backward_flops == total
    assert both.covered == 1
    assert weight.covered == (per_gradient["0"] + per_gradient["1"]) / total
    assert input_.covered == per_gradient["1"] / total
    assert (weight.saved_at(0.5), input_.saved_at(0.5)) == (weight.covered / 2, input_.covered / 2)
    assert [site.reason for site in input_.sites] == ["", "it computes no input gradient"]


def test_gradients_at_rates_equal_the_oracle() -> None:
    model = Net().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    loss = torch.Tensor.sum
    chosen = config(rates={"layer2.*": 0.75, "*": 0})
    expected = oracle_gradients(model, x, 0.75, lambda _, name: name.startswith("layer2."), loss)
    scheduler = SparsityScheduler(constant(0.1))
    compiled = ssprop_compile(model, scheduler, config=chosen, backend="aot_eager")
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
