"""Gradients of channels and of samples on a device, under Inductor, in channels_last.

On a CPU these tests are slow; `pytest -m gpu` runs them on a GPU.
"""

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from oracle import oracle_gradients, relative_error
from sample_oracle import kept_gradients, strongest
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile

BATCH = 16
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
CONFIGS = {
    "channels": SparsityConfig(gate=False, channel_multiple=1),
    "sliced": SparsityConfig(axis="sample"),
    "two passes": SparsityConfig(axis="sample", saved="kept"),
}


class Net(nn.Module):
    """Convolutions, batch norm and a linear layer, whose channels differ in gradient.

    If two scores were close, rounding would decide between them, and the oracle decide otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 64, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-1.5, 0.5, 64))
            self.hidden.weight.copy_(torch.randn(64, 64).abs() / 8)
            self.head.weight.mul_(torch.logspace(-1, 1, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(torch.relu(self.stem(x)))))
        return self.head(torch.tanh(self.hidden(x.mean((2, 3)))))


def loss(output: Tensor) -> Tensor:
    strength = torch.arange(1.0, len(output) + 1, device=output.device)
    return (output.float().sin() * strength[:, None]).sum() / len(output)


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Convolutions of float32 numbers in float32 on a GPU, as the oracle's."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def oracle(kind: str, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients in float32, of the parameters alone."""
    if kind == "channels":
        large = {"conv", "hidden"}
        found = oracle_gradients(model, x, 0.5, lambda module, name: name in large, loss)
    else:
        model = copy.deepcopy(model)
        found = kept_gradients(model, (x,), loss, lambda g: strongest(g, BATCH // 2), BATCH)
    return {name: gradient for name, gradient in found.items() if name != "inputs"}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_gradients_are_the_oracles(device: str, kind: str, precision: str) -> None:
    model = Net().to(device, memory_format=torch.channels_last)
    x = torch.randn(BATCH, 3, 16, 16, device=device).to(memory_format=torch.channels_last)
    expected = oracle(kind, model, x)
    compiled = ssprop_compile(model, SparsityScheduler(constant(0.5)), config=CONFIGS[kind])
    is_bf16 = precision == "bf16"
    for _ in range(2):
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16) if is_bf16 else contextlib.nullcontext():
            output = compiled(x)
        loss(output).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert relative_error(found, expected) < (0.05 if is_bf16 else 1e-3)
