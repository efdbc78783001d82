"""`patch=2`: gradients from patches inside the kept samples, against an oracle."""

import copy

import pytest
import torch
from oracle import relative_error
from patch_oracle import PatchOracle
from sample_models import BATCH, Net, compile_net, expected, found, images, loss
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn

from ssprop_fx import report

pytestmark = pytest.mark.filterwarnings("error::ssprop_passes.errors.NoEffectWarning")


@pytest.mark.parametrize(
    ("saved", "backend"),
    [
        ("all", "aot_eager"),
        ("kept", "aot_eager"),
        ("all", "inductor"),
        pytest.param("kept", "inductor", marks=pytest.mark.slow),
    ],
)
def test_patches_inside_kept_samples(saved: str, backend: str) -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.first, self.second = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.stem(x)))
            return self.second(torch.tanh(self.first(x))).mean((2, 3))

    model, x = Pointwise().double(), images()
    eager = copy.deepcopy(model)
    eager.first.__class__ = eager.second.__class__ = PatchOracle
    want = expected(eager, x)
    compiled = compile_net(model, backend=backend, config={"patch": 2, "saved": saved})
    loss(compiled(x)).backward()
    assert relative_error(found(model), want) < 1e-9
    printed = report(compiled)
    assert "2 convolutions take their gradients from patches" in str(printed)
    assert printed.patch_flops == 2 * BATCH * 2 * 64 * (8 * 12 + 12 * 4) * 3 // 4


def test_patches_without_effect_warn() -> None:
    with pytest.warns(NoEffectWarning, match="patch=2 has no effect"):
        loss(compile_net(Net().double(), config={"patch": 2})(images())).backward()
