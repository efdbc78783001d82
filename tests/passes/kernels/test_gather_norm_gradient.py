"""Channels gathered from a batch norm's gradient: where the pass finds them, and their values."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from norms import Norm, data, norm_of, rewrite, trace
from ssprop_passes.kernels.operators import gather_columns, gather_norm_gradient
from ssprop_passes.transforms.batch_norm import BatchNormGradientPass
from torch import Tensor, fx, nn


def kept_of(
    norm: Norm, x: Tensor, grad: Tensor, indices: Tensor, order: tuple[int, ...] | None
) -> Tensor:
    """Return channels of the gradient of x, gathered with the dimensions in `order`."""
    with torch.enable_grad():
        (dx,) = torch.autograd.grad(norm(x), x, grad)
    if order is None:
        return dx[:, indices]
    return dx.permute(order)[..., indices]


LAST = {2: None, 3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}


def check_kept(
    norm: Norm,
    x: Tensor,
    gathers: int = 1,
    own: int = 0,
    kept: Callable[..., Tensor] = kept_of,
    channels_last: bool = True,
    **tolerance: float,
) -> fx.GraphModule:
    def laid_out(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x

    with torch.no_grad():
        output = norm(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    x, grad = laid_out(x).requires_grad_(), laid_out(grad)
    fn = functools.partial(kept, norm, order=LAST[x.ndim] if channels_last else None)
    indices = torch.tensor([4, 0, 3])
    expected = fn(x, grad, indices)
    traced, bn_pass = rewrite(fn, x, grad, indices)
    assert (bn_pass.squares, bn_pass.gathers, bn_pass.own) == (0, gathers, own)
    found = traced(x, grad, indices)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **{"rtol": 1e-9, "atol": 1e-12, **tolerance})
    return traced


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(6), (4, 6, 5, 7)),
        (nn.BatchNorm2d(6, affine=False), (4, 6, 5, 7)),
        (nn.BatchNorm1d(6), (8, 6)),
        (nn.BatchNorm1d(6), (4, 6, 9)),
        (nn.BatchNorm3d(6), (2, 6, 3, 4, 5)),
    ],
    ids=["2d", "not affine", "matrix", "1d", "3d"],
)
def test_numbers_of_a_channel_are_gathered_first(norm: nn.Module, shape: tuple[int, ...]) -> None:
    traced = check_kept(norm_of(norm), data(*shape))
    (gather,) = traced.graph.find_nodes(op="call_function", target=gather_columns)
    # Scale, mean, mean gradient and projection.
    columns = gather.args[0]
    assert [column.meta["val"].numel() for column in columns] == [6, 6, 6, 6]


def test_kept_channels_of_a_gradient_that_is_rounded() -> None:
    norm = norm_of(nn.BatchNorm2d(6)).float()
    check_kept(norm, data(4, 6, 5, 7, dtype=torch.bfloat16), rtol=2e-2, atol=1e-3)


def plain(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return random numbers for which single precision is enough."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def feeds(*modules: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a single-precision norm that feeds modules in `dtype`, as under autocast."""
    norm = norm_of(nn.BatchNorm2d(6)).float()
    others = [copy.deepcopy(module).to(dtype) for module in modules]
    return nn.Sequential(norm, *others).to(memory_format=torch.channels_last)


class Shift(nn.Module):
    """Adds a number that gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


@PRECISIONS
@pytest.mark.parametrize(
    ("modules", "own"),
    [
        ((nn.ReLU(), nn.Conv2d(6, 4, 3)), 1),
        ((nn.Conv2d(6, 4, 3),), 1),
        ((nn.ReLU(),), 0),
        ((nn.SiLU(), nn.Conv2d(6, 4, 3)), 0),
        ((nn.ReLU6(), nn.Conv2d(6, 4, 3)), 0),
        ((nn.Threshold(1, 0), nn.Conv2d(6, 4, 3)), 0),
        ((nn.Threshold(0, 1), nn.Conv2d(6, 4, 3)), 0),
        ((nn.ReLU(), nn.AvgPool2d(1), nn.Conv2d(6, 4, 3)), 0),
        ((Shift(), nn.ReLU(), nn.Conv2d(6, 4, 3)), 0),
    ],
    ids=["relu", "none", "alone", "silu", "relu6", "bound", "filled", "pooled", "shifted"],
)
def test_what_lies_in_memory_is_for_the_kernel_of_our_own(
    modules: tuple[nn.Module, ...], own: int, dtype: torch.dtype, tolerance: float
) -> None:
    """A convolution writes its input gradient to memory; a ReLU may stand before it."""
    norm, x = feeds(*modules, dtype=dtype), plain(4, 6, 5, 7, dtype=dtype)
    traced = check_kept(norm, x, own=own, rtol=tolerance, atol=tolerance)
    assert len(traced.graph.find_nodes(op="call_function", target=gather_norm_gradient)) == own


class Excitation(nn.Module):
    """Squeeze and excitation of 6 channels."""

    def __init__(self, is_spread: bool = True) -> None:
        super().__init__()
        self.excite = nn.Conv2d(6, 6, 1)
        self.is_spread = is_spread

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * self.excite(squeezed if self.is_spread else squeezed.detach()).sigmoid()


@pytest.mark.parametrize(
    ("modules", "own"),
    [
        ((nn.ReLU(), Excitation(), nn.Conv2d(6, 4, 3)), 1),
        ((Excitation(), nn.Conv2d(6, 4, 3)), 1),
        ((Excitation(), nn.ReLU(), nn.Conv2d(6, 4, 3)), 0),
        ((nn.SiLU(), Excitation(), nn.Conv2d(6, 4, 3)), 0),
        ((nn.ReLU(), Excitation(is_spread=False), nn.Conv2d(6, 4, 3)), 0),
    ],
    ids=["relu first", "no relu", "relu last", "silu", "factor alone"],
)
def test_squeeze_and_excitation_is_for_the_kernel_of_our_own(
    modules: tuple[nn.Module, ...], own: int
) -> None:
    norm, x = feeds(*modules, dtype=torch.float32), plain(4, 6, 5, 7, dtype=torch.float32)
    check_kept(norm, x, own=own, rtol=1e-5, atol=1e-5)


def test_excitation_that_is_rounded_is_left() -> None:
    modules = nn.ReLU(), Excitation(), nn.Conv2d(6, 4, 3)
    norm, x = feeds(*modules, dtype=torch.bfloat16), plain(4, 6, 5, 7, dtype=torch.bfloat16)
    check_kept(norm, x, own=0, rtol=3e-2, atol=3e-2)


@PRECISIONS
def test_a_gradient_that_others_read_too_lies_in_memory(
    dtype: torch.dtype, tolerance: float
) -> None:
    """This happens after a residual connection."""

    def kept(
        norm: Norm, x: Tensor, grad: Tensor, indices: Tensor, order: tuple[int, ...]
    ) -> Tensor:
        with torch.enable_grad():
            branch = torch.zeros_like(x).requires_grad_()
            out = torch.relu(norm(x) + branch)
            dx, residual = torch.autograd.grad(out, (x, branch), grad)
        return dx.permute(order)[..., indices] + residual.sum()

    norm, x = feeds(dtype=dtype), plain(4, 6, 5, 7, dtype=dtype)
    check_kept(norm, x, own=1, kept=kept, rtol=tolerance, atol=tolerance)


def test_what_lies_in_memory_in_another_precision_than_the_norms_input_is_left() -> None:
    norm, x = feeds(nn.Conv2d(6, 4, 3), dtype=torch.float32), plain(4, 6, 5, 7, dtype=torch.float32)
    half = x.to(torch.bfloat16)
    check_kept(lambda x: norm(x.float()), half, own=0, rtol=2e-2, atol=2e-2)


def test_channels_that_are_not_innermost_are_left() -> None:
    check_kept(norm_of(nn.BatchNorm2d(6)), data(4, 6, 5, 7), gathers=0, channels_last=False)


def test_kept_channels_of_other_gradients_are_left() -> None:
    check_kept(nn.GroupNorm(3, 6).double(), data(4, 6, 5, 7), gathers=0)


def test_a_gradient_that_others_read_is_left() -> None:
    """The gradient is written to memory for the other readers, and the gather reads it there."""

    def kept(
        norm: Norm, x: Tensor, grad: Tensor, indices: Tensor, order: tuple[int, ...]
    ) -> Tensor:
        with torch.enable_grad():
            (dx,) = torch.autograd.grad(norm(x), x, grad)
        return dx.permute(order)[..., indices] * dx.abs().sum()

    check_kept(norm_of(nn.BatchNorm2d(6)), data(4, 6, 5, 7), gathers=0, kept=kept)


def test_gathers_of_others_are_left() -> None:
    fn = functools.partial(kept_of, norm_of(nn.BatchNorm1d(6)), order=None)
    x, grad = data(8, 6).requires_grad_(), data(8, 6)
    traced = trace(fn, x, grad, torch.tensor([4, 0]))
    bn_pass = BatchNormGradientPass(dict)
    bn_pass.transform(traced.graph)
    assert bn_pass.gathers == 0
