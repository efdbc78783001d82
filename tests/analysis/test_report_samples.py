"""`report` of a backward of the kept samples."""

import pytest
import torch
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


def test_all_products_shrink_with_the_samples() -> None:
    scheduler = SparsityScheduler(constant(0.75))
    config = SparsityConfig(axis="sample")
    model = ssprop_compile(Attention(), scheduler, config=config, backend="aot_eager")
    assert report(model).sites == ()
    model(torch.randn(8, 4, 8)).sum().backward()
    made = report(model)
    assert made.kept_samples == (2, 8)
    assert made.saved_flops == 0.75 * made.backward_flops
    (site,) = made.sites
    assert not site.reason
    assert site.saved_flops == 0.75 * site.flops < made.saved_flops
    assert "runs on 2 of 8 samples; 75.0% saved" in str(made)
    assert made.samples is not None
    assert f"kept {made.samples.kept_mass:.1%} of the sum of the gradients' norms" in str(made)
    # The gradient of a sum is the same for all samples.
    assert made.samples.kept_mass == pytest.approx(0.25)
    assert made.samples.error == pytest.approx(0.75)


def test_channels_inside_the_kept_samples() -> None:
    scheduler = SparsityScheduler(constant(0.75))
    config = SparsityConfig(axis="sample", rates={"*": 0.5}, min_channels=1, channel_multiple=1)
    model = ssprop_compile(nn.Linear(8, 8), scheduler, config=config, backend="aot_eager")
    model(torch.randn(8, 8).requires_grad_()).sum().backward()
    made = report(model)
    assert made.saved_flops == (1 - 0.25 * 0.5) * made.backward_flops
    assert made.sites[0].kept == 4


def test_a_whole_backward_says_why() -> None:
    class Flip(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(0))

    scheduler = SparsityScheduler(constant(0.75))
    config = SparsityConfig(axis="sample")
    model = ssprop_compile(Flip(8, 8), scheduler, config=config, backend="aot_eager")
    with pytest.warns(NoEffectWarning, match="whole batch"):
        model(torch.randn(8, 8)).sum().backward()
    made = report(model)
    assert made.kept_samples is None
    assert made.saved_flops == 0
    assert "moves or mixes samples" in str(made)
