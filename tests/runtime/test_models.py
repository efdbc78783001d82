"""Gradients of whole timm models against the oracle, in float64."""

import copy

import pytest
import timm
import torch
from oracle import gradients, oracle_gradients, relative_error
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile

MODELS = ("resnet18", "vgg11", "vgg11_bn", "densenet121", "regnety_002")
SLOWER = ("vgg11", "vgg11_bn", "densenet121", "regnety_002")
SIZE = 64


def takes_part(module: nn.Module, name: str) -> bool:
    return getattr(module, "groups", 1) == 1


def loss(output: Tensor) -> Tensor:
    return output.logsumexp(1).mean() + output.square().mean()


def error_of(name: str, drop_rate: float, backend: str) -> float:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).double().train()
    inputs = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    expected = oracle_gradients(copy.deepcopy(model), inputs, drop_rate, takes_part, loss)
    config = SparsityConfig(channel_multiple=1, min_channels=1, filter_fn=takes_part)
    scheduler = SparsityScheduler(constant(drop_rate))
    compiled = ssprop_compile(model, scheduler, config=config, backend=backend)
    inputs = inputs.clone().requires_grad_()
    loss(compiled(inputs)).backward()
    return relative_error(gradients(model, inputs), expected)


CASES = [
    # The slower models and the lower rate are slow tests.
    pytest.param(name, rate, marks=pytest.mark.slow if name in SLOWER or rate < 0.8 else ())
    for name in MODELS
    for rate in (0.5, 0.8)
]


@pytest.mark.parametrize(("name", "drop_rate"), CASES)
def test_gradients_equal_the_oracle_under_aot_eager(name: str, drop_rate: float) -> None:
    assert error_of(name, drop_rate, "aot_eager") < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11", "regnety_002"])
def test_gradients_equal_the_oracle_under_inductor(name: str) -> None:
    assert error_of(name, 0.8, "inductor") < 1e-8
