"""The operators that a sparse backward calls, compared with torch."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ssprop_passes.kernels import operators
from ssprop_passes.kernels.operators import (
    gather_columns,
    gather_norm_gradient,
    gather_weight,
    reduced_conv_backward,
    scatter_rows,
)
from torch import Tensor
from torch._inductor.codecache import CppCodeCache
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(("mask", "products"), [((True, True), 2), ((False, True), 1)])
def test_its_operations_are_known_to_torch(mask: tuple[bool, bool], products: int) -> None:
    operators.register_flops()
    tensors = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5), torch.randn(3, 4, 1, 1)
    with FlopCounterMode(display=False) as counter:
        reduced_conv_backward(*tensors, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, list(mask), False)
    # A multiply-add for each of 4 sources at each of 2 * 3 * 5 * 5 results.
    assert counter.get_total_flops() == products * 2 * 4 * 150


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def test_columns_are_gathered() -> None:
    columns, indices = (
        [torch.arange(6.0), torch.arange(6.0, 12).view(1, 6, 1)],
        torch.tensor([4, 0]),
    )
    assert gather_columns(columns, indices).tolist() == [[4.0, 0.0], [10.0, 6.0]]
    torch.library.opcheck(gather_columns, (columns, indices), test_utils=CHECKS)


def norm_case(
    *space: int,
    is_masked: bool = True,
    is_excited: bool = False,
    dtype: torch.dtype = torch.float32,
    channels: int = 21,
    indices: Sequence[int] = (20, 3, 4, 17, 0, 9, 11),
) -> list[Any]:
    g, x = (torch.randn(*space, channels).to(dtype) for _ in range(2))
    flat, spread = (channels,), (1, channels, 1, 1)
    shapes = [flat, spread, spread, flat, *([spread, flat, flat] if is_masked else [])]
    excitation = [torch.randn(space[0], channels, 1, 1) for _ in range(2)] if is_excited else []
    constants = [torch.randn(shape) for shape in shapes]
    return [g, x, constants, excitation, torch.tensor(indices, dtype=torch.long)]


def norm_expected(
    g: Tensor, x: Tensor, constants: list[Tensor], excitation: list[Tensor], at: Tensor
) -> Tensor:
    scale, mean, mean_g, projection, *affine = (constant.view(-1) for constant in constants)
    passed, dtype = g, g.dtype
    if excitation:
        factor, addend = (
            part.view(len(g), *[1] * (g.ndim - 2), g.shape[-1]) for part in excitation
        )
        passed = g.float() * factor + addend
    if affine:
        inverse_std, weight, bias = affine
        passed = torch.where(torch.relu((x - mean) * inverse_std * weight + bias) <= 0, 0, passed)
    return ((passed - (x - mean) * projection - mean_g) * scale)[..., at].to(dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("space", [(5,), (2, 3, 4), (0, 3)])
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("is_excited", [True, False])
def test_channels_of_a_norms_gradient(
    space: tuple[int, ...], is_masked: bool, is_excited: bool, dtype: torch.dtype
) -> None:
    inputs = norm_case(*space, is_masked=is_masked, is_excited=is_excited, dtype=dtype)
    torch.testing.assert_close(gather_norm_gradient(*inputs), norm_expected(*inputs))
    if is_excited == is_masked:
        torch.library.opcheck(gather_norm_gradient, tuple(inputs), test_utils=CHECKS)


@DTYPES
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize(
    "indices",
    [[69], [0, 15, 16, 31, 32, 33, 63, 64, 69], [40, 3], [3, 3, 40], [*range(70)], []],
    ids=["last", "in order", "not in order", "twice", "all", "none"],
)
def test_channels_in_whatever_order(
    indices: list[int], is_masked: bool, dtype: torch.dtype
) -> None:
    """Channels in order are picked from vectors of 16 or 32 channels, if the processor can."""
    inputs = norm_case(
        7, 5, is_masked=is_masked, is_excited=True, dtype=dtype, channels=70, indices=indices
    )
    torch.testing.assert_close(gather_norm_gradient(*inputs), norm_expected(*inputs))


def test_numbers_are_rounded_as_torch_rounds() -> None:
    """Ties round to even: 1 + 2**-8 and 1 + 3 * 2**-8 each lie halfway between two numbers."""
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan")])
    scale = torch.cat([halves, -halves, 10 * torch.randn(13)])
    none, g = torch.zeros(21), torch.randn(500, 21).to(torch.bfloat16)
    g[0] = 1
    constants = [scale, none, none, none]
    found = gather_norm_gradient(g, g, constants, [], torch.arange(21))
    expected = (g * scale).to(torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@DTYPES
def test_what_is_not_a_number_passes_the_mask_as_in_torch(dtype: torch.dtype) -> None:
    g, x, *others = norm_case(5, dtype=dtype)
    g[1, 20], x[2, 3], x[3, 4], x[4, 17] = torch.nan, torch.nan, torch.inf, -torch.inf
    found = gather_norm_gradient(g, x, *others)
    torch.testing.assert_close(found, norm_expected(g, x, *others), equal_nan=True)


def test_the_mask_is_that_of_the_forward() -> None:
    """The forward rounds each product and sum: if they cancel, the mask depends on every bit."""
    x = torch.randn(5000, 21)
    mean, inverse_std, weight = (torch.randn(21).abs() + 0.5 for _ in range(3))
    bias = -((x[7] - mean) * inverse_std * weight)
    x[::2] = x[7]
    one, none = torch.ones(21), torch.zeros(21)
    g = torch.ones_like(x)
    constants = [one, mean, none, none, inverse_std, weight, bias]
    found = gather_norm_gradient(g, x, constants, [], torch.arange(21))
    passed = torch.relu((x - mean) * inverse_std * weight + bias) > 0
    assert not passed[::2].any()
    torch.testing.assert_close(found, passed.float(), rtol=0, atol=0)


def test_tensors_and_indices_that_lie_otherwise() -> None:
    g, x, *others, indices = norm_case(4, 3, is_excited=True)
    expected = norm_expected(g, x, *others, indices)
    g, x = (part.transpose(0, 1).contiguous().transpose(0, 1) for part in (g, x))
    indices = torch.stack([indices.int(), indices.int()], 1)[:, 0]
    torch.testing.assert_close(gather_norm_gradient(g, x, *others, indices), expected)


@pytest.mark.parametrize("index", [21, -1])
def test_a_channel_that_a_norm_does_not_have(index: int) -> None:
    *inputs, indices = norm_case(5)
    with pytest.raises(IndexError, match="out of range"):
        gather_norm_gradient(*inputs, indices.index_fill(0, torch.tensor(2), index))


@DTYPES
@pytest.mark.usefixtures("no_kernel_yet")
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("is_excited", [True, False])
def test_channels_of_a_norms_gradient_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, is_masked: bool, is_excited: bool, dtype: torch.dtype
) -> None:
    def fail(source: str) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    inputs = norm_case(5, 2, is_masked=is_masked, is_excited=is_excited, dtype=dtype)
    with pytest.warns(UserWarning, match="gather_norm_gradient does not compile.*no compiler"):
        found = gather_norm_gradient(*inputs)
    torch.testing.assert_close(found, norm_expected(*inputs))


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((6,), False),
        ((6, 5), False),
        ((6, 5, 2), False),
        ((6, 5, 2, 3), False),
        ((6, 5, 2, 3), True),
        ((6, 5, 2, 3, 2), True),
    ],
)
def test_rows_are_gathered_and_scattered(shape: tuple[int, ...], channels_last: bool) -> None:
    """`opcheck` makes sure that the layout is the one of the fake kernel."""
    x, indices = torch.randn(shape), torch.tensor([4, 0, 3])
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    rows = gather_weight(x, indices, channels_last)
    assert torch.equal(rows, x[indices])
    full = scatter_rows(rows, indices, 6, channels_last)
    assert torch.equal(full, torch.zeros(shape).index_put([indices], rows))
    assert full.stride() == x.stride()
    torch.library.opcheck(gather_weight, (x, indices, channels_last), test_utils=CHECKS)
    torch.library.opcheck(scatter_rows, (rows, indices, 6, channels_last), test_utils=CHECKS)


def test_rows_of_a_tensor_that_lies_otherwise() -> None:
    """An example is the transposed weight of a linear layer; the result is contiguous."""
    x, indices = torch.randn(5, 6).t(), torch.tensor([4, 0, 3])
    rows = gather_weight(x, indices, False)
    assert torch.equal(rows, x[indices])
    assert rows.is_contiguous()
    torch.library.opcheck(gather_weight, (x, indices, False), test_utils=CHECKS)
