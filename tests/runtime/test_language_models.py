"""Layers of language models: a weight of [in, out] as in GPT-2, LoRA as in peft, tied heads."""

import copy
import warnings

import pytest
import torch
from layers import EXACT, everywhere, loss
from oracle import gradients, oracle_gradients, relative_error
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.runtime.module import SsPropModule


def sparse(model: nn.Module, **kwargs: object) -> SsPropModule:
    kwargs = {"config": EXACT, "backend": "aot_eager", **kwargs}
    return ssprop_compile(model, SparsityScheduler(constant(0.7)), **kwargs)


class Conv1D(nn.Module):
    """The linear layer of GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = *x.shape[:-1], self.weight.shape[1]
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(size)


class Plain(nn.Module):
    """A linear layer of one's own, without a bias."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Transposed(nn.Linear):
    """Its input is a transpose, and autograd computes the transpose of its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, 1).t().contiguous().t()
        return super().forward(y).unflatten(0, x.shape[:2])


LAYERS = {
    "GPT-2": Conv1D,
    "own": Plain,
    "transposed input": lambda outputs, inputs: Transposed(inputs, outputs),
}


def as_linear(model: nn.Sequential) -> nn.Sequential:
    """The same model with `nn.Linear` for each layer."""
    layers = []
    for layer in model:
        if isinstance(layer, Conv1D | Plain):
            inputs, outputs = layer.weight.shape
            linear = nn.Linear(inputs, outputs, bias=hasattr(layer, "bias")).double()
            linear.weight = nn.Parameter(layer.weight.detach().t().clone())
            if hasattr(layer, "bias"):
                linear.bias = nn.Parameter(layer.bias.detach().clone())
            layers.append(linear)
        else:
            layers.append(copy.deepcopy(layer))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(12, 12, 12), (6, 20, 10)], ids=["square", "not square"])
@pytest.mark.parametrize("name", LAYERS)
def test_both_gradients_of_a_transposed_weight_are_sparse(
    name: str, shape: tuple[int, int, int], backend: str
) -> None:
    inputs, hidden, outputs = shape
    make = LAYERS[name]
    model = nn.Sequential(nn.Tanh(), make(hidden, inputs), nn.Tanh(), make(outputs, hidden))
    model = model.double()
    x = torch.randn(2, 5, inputs, dtype=torch.float64)
    expected = oracle_gradients(as_linear(model), x, 0.7, everywhere, loss)
    compiled = sparse(model, backend=backend)
    x.requires_grad_()
    loss(compiled(x)).backward()
    found = gradients(model, x)
    if name != "transposed input":
        found = {key: g.t() if key.endswith("weight") else g for key, g in found.items()}
    assert relative_error(found, expected) < 1e-10
    seen = report(compiled)
    assert [(site.name, site.reason) for site in seen.sites] == [("3", ""), ("1", "")]
    assert seen.saved_flops > 0.6 * seen.backward_flops


class Lookup(nn.Module):
    """Its weight may be that of an embedding or of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_weight_that_may_be_an_embedding_says_what_would_tell() -> None:
    model = sparse(nn.Sequential(nn.Linear(6, 12), Lookup()))
    loss(model(torch.randn(4, 6))).backward()
    reasons = {site.name: site.reason for site in report(model).sites}
    assert reasons == {
        "0": "",
        "1": "its weight may be an embedding: in_features and out_features tell",
    }


class LoRA(nn.Module):
    """As in peft: a wrapper that owns no weight but shows that of the layer in it."""

    def __init__(self, layer: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.in_features, self.out_features = (
            layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
        )
        self.lora_A = nn.ModuleDict({"default": nn.Linear(self.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, self.out_features, bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_A["default"](x)
        return self.base_layer(x) + 2 * self.lora_B["default"](low)


def test_lora_has_right_gradients_and_no_alarm() -> None:
    model = nn.Sequential(LoRA(nn.Linear(8, 16)), nn.Tanh(), LoRA(Conv1D(12, 16))).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    plain[2].base_layer = as_linear(nn.Sequential(model[2].base_layer))[0].requires_grad_(False)
    expected = oracle_gradients(plain, x, 0.7, everywhere, loss)
    config = SparsityConfig(channel_multiple=1, min_channels=1)
    compiled = sparse(model, config=config)
    names = [f"{i}.{n}" for i in (0, 2) for n in ("base_layer", "lora_A.default", "lora_B.default")]
    assert [slot.name for slot in compiled.ssprop.table.slots] == names
    x.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    assert {site.name for site in report(compiled).sparse_sites} == set(names)


def test_the_first_frozen_layer_needs_no_backward_and_gives_no_alarm() -> None:
    compiled = sparse(nn.Sequential(LoRA(nn.Linear(8, 16)), nn.Tanh(), LoRA(nn.Linear(16, 16))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(compiled(torch.randn(2, 8))).backward()
    assert "0.base_layer" not in {site.name for site in report(compiled).sites}


class Language(nn.Module):
    """A small GPT: its head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.up, self.down = Conv1D(24, 16), Conv1D(16, 24)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(self.up(x).tanh()))


def test_a_gpt_with_a_tied_head_is_sparse_everywhere() -> None:
    compiled = sparse(Language())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(compiled(torch.randint(40, (2, 5)))).backward()
    seen = report(compiled)
    assert {site.name: site.reason for site in seen.sites} == {"head": "", "up": "", "down": ""}
    assert seen.saved_flops > 0.65 * seen.backward_flops


def test_a_layer_with_a_transposed_weight_may_have_a_memory() -> None:
    model = nn.Sequential(Conv1D(12, 6), nn.Tanh())
    config = SparsityConfig(channel_multiple=1, min_channels=1, memory=0.9)
    compiled = sparse(model, config=config)
    for _ in range(2):
        loss(compiled(torch.randn(2, 5, 6))).backward()
    (held,) = compiled.ssprop.memory.state_dict().values()
    assert held.shape == (12,)
    assert held.any()
