"""Layers whose gradients come from some positions: against oracles in float64, and by draws."""

import time
import warnings
from collections.abc import Iterator

import pytest
import timm
import torch
from patch_oracle import patch_oracle
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.positions.command import measure
from benchmarks.positions.patches import PatchConv2d, swap_patches
from benchmarks.positions.products import measure_products, product_shapes
from benchmarks.positions.rows import RowConv2d, RowLinear, draw_rows, swap_rows
from benchmarks.workload import Workload
from ssprop_fx import AddedNoise, SparsityConfig, SparsityScheduler, ssprop_compile


def gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Return the gradients of the input and of the layer's parameters."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(layer(x), [x, *layer.parameters()], grad))


def pair(layer: nn.Module, swapped: type[nn.Module], share: float) -> nn.Module:
    """Return a layer of a class of `benchmarks.positions` with the same parameters."""
    layer.__class__ = swapped
    layer.share = torch.tensor(share)
    return layer


LAYERS = [
    (lambda: nn.Linear(6, 5).double(), RowLinear, (2, 20, 6)),
    (lambda: nn.Conv2d(6, 5, 1).double(), RowConv2d, (2, 6, 4, 5)),
]


@pytest.mark.parametrize(("make", "swapped", "shape"), LAYERS)
def test_all_rows_are_dense_and_some_are_unbiased(make, swapped, shape) -> None:
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(shape, dtype=torch.float64)
    grad = torch.randn_like(layer(x)) * torch.rand(shape[0], *[1] * (x.ndim - 1)) ** 4
    dense = gradients(layer, x, grad)
    for one, other in zip(dense, gradients(pair(layer, swapped, share=1), x, grad), strict=True):
        torch.testing.assert_close(one, other)
    layer.share = torch.tensor(0.4)
    draws = [gradients(layer, x, grad) for _ in range(1500)]
    # Input and bias are exact; the weight is so in the mean alone.
    for index in (0, 2):
        assert all((draw[index] - dense[index]).abs().max() < 1e-9 for draw in draws[:5])
    weights = torch.stack([draw[1] for draw in draws])
    error = weights.std(0) / len(draws) ** 0.5
    assert weights.std(0).min() > 0
    # Some of 30 entries may be beyond four standard errors by rounding, none by chance.
    assert ((weights.mean(0) - dense[1]).abs() <= 4 * error + 1e-9).all()


def test_draws_have_their_probabilities_and_their_size() -> None:
    torch.manual_seed(1)
    scores = torch.tensor([9.0, 1.0, 2.0, 0.0, 4.0, 1.0, 0.5, 2.5])
    # Of k = 3: rows 0 and 4 would get 27 / 20 and, after row 0 is certain, 8 / 11.
    expected = torch.tensor([1, 2 / 11, 4 / 11, 0, 8 / 11, 2 / 11, 1 / 11, 5 / 11])
    seen = torch.zeros(8)
    for _ in range(4000):
        indices, weights = draw_rows(scores, 3)
        assert len(indices) == 3
        torch.testing.assert_close(weights, 1 / expected[indices])
        seen[indices] += 1
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((seen / 4000 - expected).abs() <= 4 * error).all()
    # More than have a score.
    assert draw_rows(torch.tensor([0.0, 1.0, 3.0]), 2)[0].tolist() == [1, 2]


def test_a_gradient_that_is_not_finite_stays() -> None:
    layer = pair(nn.Linear(6, 5), RowLinear, share=0.4)
    grad = torch.ones(20, 5)
    grad[7, 3] = torch.nan
    assert gradients(layer, torch.randn(20, 6), grad)[1][3].isnan().all()


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "groups", "size"),
    [(1, 1, 0, 1, 6), (3, 1, 1, 1, 7), (3, 2, 1, 1, 7), (2, 2, 0, 1, 8), (5, 1, 2, 4, 6)],
)
def test_patches_agree_with_a_loop(
    r: int, kernel: int, stride: int, padding: int, groups: int, size: int
) -> None:
    torch.manual_seed(0)
    out = 4 if groups > 1 else 3
    layer = nn.Conv2d(4, out, kernel, stride, padding, groups=groups).double()
    x = torch.randn(2, 4, size, size, dtype=torch.float64)
    grad = torch.randn_like(layer(x))
    with torch.no_grad():
        expected = patch_oracle(layer, x, grad, r)
    dense = gradients(layer, x, grad)
    found = gradients(swap_patches(nn.Sequential(layer), r), x, grad)
    assert isinstance(layer, PatchConv2d)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    if r == kernel == 1:
        torch.testing.assert_close(found, dense)


def test_patches_of_what_is_constant_are_exact() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 1).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    grad = functional.interpolate(torch.randn(2, 3, 3, 3, dtype=torch.float64), scale_factor=2)
    dense = gradients(layer, x, grad)
    torch.testing.assert_close(gradients(swap_patches(nn.Sequential(layer), 2), x, grad), dense)


def test_other_layers_stay() -> None:
    model = nn.ModuleList(
        [
            nn.Conv2d(8, 8, 3, groups=2, padding=1),
            nn.Conv2d(8, 8, 3, dilation=2, padding=2),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 8, 3, stride=(1, 2), padding=1),
            nn.Linear(64, 64),
        ]
    )
    types = [type(module) for module in model]
    swap_patches(swap_rows(model, 0.5), 2)
    assert [type(module) for module in model] == types


@pytest.fixture
def vit() -> Iterator[nn.Module]:
    torch._dynamo.reset()
    yield timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=192, depth=1, num_classes=4
    )
    torch._dynamo.reset()


def test_the_sliced_backward_takes_rows(vit: nn.Module) -> None:
    swap_rows(vit, 0.5)
    assert isinstance(vit.blocks[0].mlp.fc1, RowLinear)
    rule = AddedNoise(1e-9, budget=0.5)
    compiled = ssprop_compile(
        vit,
        SparsityScheduler(controller=rule),
        config=SparsityConfig(axis="sample"),
        backend="aot_eager",
    )
    images = torch.randn(8, 3, 32, 32)
    with warnings.catch_warnings():
        # No warning says that the backward is of the whole batch.
        warnings.simplefilter("error", UserWarning)
        compiled(images).logsumexp(1).sum().backward()
    assert compiled.ssprop.samples.kept == 4
    assert vit.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_the_command_measures_every_variant() -> None:
    workload = Workload(model="test_convnext", batch_size=4, img_size=32, backend="aot_eager")
    rows = measure(workload, [0.5], rounds=1)
    assert [row.variant for row in rows] == [
        "dense",
        "rows",
        "patches",
        "patches 1x1",
        "samples",
        "samples, half of their rows",
    ]
    assert rows[0].speedup == 1
    assert all(row.step_ms > 0 for row in rows)


def test_products_count_every_layer_that_takes_rows(vit: nn.Module) -> None:
    shapes = product_shapes(vit, torch.randn(2, 3, 32, 32))
    tokens = 2 * (4 + 1)
    assert shapes == {
        (tokens, 576, 192): 1,
        (tokens, 192, 192): 1,
        (tokens, 768, 192): 1,
        (tokens, 192, 768): 1,
    }
    workload = Workload(model="test_vit", batch_size=2, img_size=160)
    (row,) = measure_products(workload, [0.5], 1, time.process_time)
    assert row.layers == sum(product_shapes(*workload.build()).values())
