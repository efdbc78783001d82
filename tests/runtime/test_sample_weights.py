"""Unbiased draws of samples: the weights 1/p reach every parameter."""

import copy
from typing import Any

import pytest
import torch
from oracle import inclusion_probabilities, relative_error
from sample_models import (
    BATCH,
    KEPT,
    Broken,
    Net,
    compile_net,
    found,
    images,
    loss,
)
from sample_oracle import kept_gradients
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("error::ssprop_passes.errors.NoEffectWarning")


class Frames(nn.Module):
    """A batch norm over samples merged with frames, or the same norm over apart dimensions."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if merged else nn.BatchNorm3d(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.stack([x, x.flip(2)], 1).flatten(0, 1)
        y = torch.tanh(self.stem(frames))
        if self.merged:
            y = self.norm(y).unflatten(0, (-1, 2))
        else:
            y = self.norm(y.unflatten(0, (-1, 2)).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(y).mean((1, 3, 4)))


class Plain(Net):
    """A batch norm without weight and bias, of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.features(x)))


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    # In float32 under Inductor: torch 2.11 misjudges a dtype in attention of float64.
    [("aot_eager", torch.float64, 1e-9), ("inductor", torch.float32, 1e-4)],
)
@pytest.mark.parametrize("kind", [Net, Plain, Broken, Frames])
def test_weights_of_sampled_samples(
    kind: Any, backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    """The draw of the backward, with weights 1/p on the gradients of the outputs."""
    if kind is Frames:
        model, same = Frames(merged=True).to(dtype), Frames(merged=False).to(dtype)
        same.load_state_dict(model.state_dict())
    else:
        model = kind().to(dtype)
        same = copy.deepcopy(model)
    compiled = compile_net(model, config={"select": "sampled"}, backend=backend)

    def choose(gradients: list[Tensor]) -> Tensor:
        factors = torch.zeros(BATCH, dtype=dtype)
        scores = gradients[0].flatten(1).norm(dim=1)
        factors[kept] = 1 / inclusion_probabilities(scores, KEPT)[kept]
        return factors

    y = images().to(dtype).requires_grad_()
    loss(compiled(y)).backward()
    assert y.grad is not None
    kept = y.grad.flatten(1).any(1).nonzero().flatten()
    want = kept_gradients(same, (y.detach(),), loss, choose, BATCH)
    assert relative_error(found(model), want) < tolerance
