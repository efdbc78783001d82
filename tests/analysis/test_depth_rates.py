"""Drop rates by depth."""

import pytest
import torch
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, by_depth, inspect_sites
from ssprop_fx.analysis.inspection import Inspection
from ssprop_fx.compiler.slots import find_slots
from ssprop_fx.training.config import TrainConfig
from ssprop_fx.training.errors import CommandError
from ssprop_fx.training.setup import check_rates, sparsity_config


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.twice = nn.Conv2d(32, 32, 3, padding=1)
        self.narrow = nn.Conv2d(32, 8, 1)
        self.last = nn.Conv2d(8, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.stem(x).tanh()).tanh()
        return self.last(self.narrow(self.twice(x))).mean((2, 3))


def inspect(**options: object) -> Inspection:
    config = SparsityConfig(channel_multiple=1, **options)
    return inspect_sites(Net(), torch.empty(2, 3, 8, 8), config=config)


@pytest.mark.parametrize(("rate", "slope"), [(0.8, 0.2), (0.5, 0.5), (0.5, -0.3), (0.7, 0)])
def test_the_flops_saved_are_those_of_one_rate(rate: float, slope: float) -> None:
    inspection = inspect()
    rates = by_depth(inspection, rate, slope)
    assert list(rates) == ["stem", "twice", "last"], "narrow has too few channels"
    assert all(0 < r < 1 for r in rates.values())
    sites = inspection.sparse_sites
    saved = sum(site.sparse_flops * rates[site.name] for site in sites)
    assert saved == pytest.approx(rate * sum(site.sparse_flops for site in sites))
    falls = [a - b for a, b in zip(list(rates.values()), list(rates.values())[1:], strict=False)]
    assert all((fall > 0) == (slope > 0) for fall in falls)


def test_the_rates_are_a_configs() -> None:
    rates = by_depth(inspect(), 0.5, 0.2)
    table = find_slots(Net(), SparsityConfig(rates=rates))
    assert table.rates == rates


@pytest.mark.parametrize(
    ("rate", "slope", "message"),
    [
        (0.0, 0.0, r"rate must be in \(0, 1\), got 0.0"),
        (0.8, 0.3, "slope must be within 0.2 of 0"),
        (0.3, -0.4, "slope must be within 0.3 of 0"),
        (0.3, float("nan"), "slope must be within"),
    ],
)
def test_mistakes_are_named(rate: float, slope: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        by_depth(inspect(), rate, slope)
    with pytest.raises(ValueError, match=r"^inspection must have a layer that would be sparse"):
        by_depth(inspect(min_channels=1000), 0.5, 0.1)
    with pytest.raises(TypeError, match=r"^inspection must be what inspect_sites returns, got Net"):
        by_depth(Net(), 0.5, 0.1)


def test_the_trainer_names_a_pattern_that_matches_nothing() -> None:
    config = TrainConfig(sparsity=SparsityConfig(rates={"nothing": 0.5}))
    with pytest.raises(CommandError, match=r"^--rates has the pattern 'nothing', which matches no"):
        check_rates(sparsity_config(config), Net())
