"""Gradients of a 1x1 convolution from patches, against a loop in float64."""

import pytest
import torch
from patch_oracle import patch_oracle
from ssprop_passes.replacements.patches import patch_gradients
from torch import Tensor, nn
from torch.nn import functional

ALL = (True, True, True)


def layer_and_tensors(space: tuple[int, int]) -> tuple[nn.Conv2d, Tensor, Tensor]:
    layer = nn.Conv2d(5, 3, 1).double()
    x = torch.randn(2, 5, *space, dtype=torch.float64)
    return layer, x, torch.randn(2, 3, *space, dtype=torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("space", [(6, 6), (7, 4), (1, 5)])
def test_equal_a_loop(space: tuple[int, int], side: int, layout: torch.memory_format) -> None:
    layer, x, grad = layer_and_tensors(space)
    with torch.no_grad():
        want = patch_oracle(layer, x, grad, side)
        x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
        found = patch_gradients(grad, x, layer.weight, side, ALL)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


def test_exact_where_patches_are_constant() -> None:
    """The gradient of the weight needs only one of the two to be constant."""
    layer, x, grad = layer_and_tensors((6, 6))
    grad = functional.interpolate(grad[..., :3, :3], scale_factor=2)
    x.requires_grad_()
    want = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
    with torch.no_grad():
        found = patch_gradients(grad, x, layer.weight, 2, ALL)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_wanted(wanted: int) -> None:
    layer, x, grad = layer_and_tensors((6, 6))
    mask = [i == wanted for i in range(3)]
    with torch.no_grad():
        found = patch_gradients(grad, x, layer.weight, 2, mask)
    assert [gradient is not None for gradient in found] == mask


def test_bfloat16_is_near_float64() -> None:
    layer, x, grad = layer_and_tensors((7, 7))
    with torch.no_grad():
        want = patch_oracle(layer, x, grad, 2)
        low = [t.to(torch.bfloat16) for t in (grad, x, layer.weight)]
        found = patch_gradients(*low, 2, ALL)
    for one, other in zip(found, want, strict=True):
        assert one is not None
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() / other.norm() < 0.02
