"""A model for `axis="sample"`, and its gradients of the kept samples."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from oracle import relative_error
from sample_oracle import kept_gradients, strongest
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile

__all__ = [
    "BATCH",
    "KEPT",
    "Broken",
    "Net",
    "check",
    "compile_net",
    "expected",
    "found",
    "images",
    "loss",
]

BATCH, KEPT = 6, 3


class Net(nn.Module):
    """Convolutions, batch norm, tokens merged into the batch, windows, attention, a class token."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.first = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.window = nn.Linear(8, 8)
        self.dropout = nn.Dropout(drop)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.dropout(torch.tanh(self.depthwise(x)))
        x = x.flatten(2).transpose(1, 2)
        # The leading dimension becomes four times the batch.
        windows = torch.tanh(self.window(x.reshape(4 * x.shape[0], -1, 8)))
        x = x + windows.reshape(x.shape)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y = self.first(x)
        x = x + self.dropout(self.attention(y, y, y, need_weights=False)[0])
        return x[:, 0]


class Broken(Net):
    """Two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        torch._dynamo.graph_break()
        return self.head(torch.tanh(features))


def loss(output: Any) -> Tensor:
    outputs = [output] if isinstance(output, Tensor) else output
    strength = torch.arange(1.0, outputs[0].shape[0] + 1, dtype=outputs[0].dtype)
    return sum((o.sin() * strength[:, None]).sum() for o in outputs)


def images(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def expected(
    model: nn.Module, x: Tensor, kept: int = KEPT, loss: Callable[[Any], Tensor] = loss
) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    return kept_gradients(model, (x,), loss, lambda g: strongest(g, kept), x.shape[0])


def compile_net(model: nn.Module, rate: float = 0.5, **options: Any) -> Any:
    config = SparsityConfig(axis="sample", **options.pop("config", {}))
    scheduler = SparsityScheduler(constant(rate))
    return ssprop_compile(model, scheduler, config=config, **{"backend": "aot_eager", **options})


def found(model: nn.Module) -> dict[str, Tensor]:
    model = getattr(model, "_orig_mod", model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def check(model: nn.Module, compiled: Any, x: Tensor, kept: int = KEPT) -> None:
    want = expected(model, x, kept)
    loss(compiled(x)).backward()
    assert relative_error(found(model), want) < 1e-9
