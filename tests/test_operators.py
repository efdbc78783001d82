"""The operator of the reduced convolution, against ATen's own convolution backward."""

from typing import Any

import pytest
import torch
from ssprop_passes.operators import reduced_conv_backward
from torch import Tensor

aten = torch.ops.aten


def gradients(
    channels: int,
    sources: int,
    groups: int,
    kernel: tuple[int, ...],
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    mask: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float64,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Any]]:
    """Return the operator's gradients, ATen's, and the shapes that the operator calls ATen with."""
    torch.manual_seed(0)
    ndim = len(kernel)
    x = torch.randn(2, sources * groups, *[9] * ndim, dtype=dtype)
    weight = torch.randn(channels * groups, sources, *kernel, dtype=dtype)
    strides, paddings, dilations = [stride] * ndim, [padding] * ndim, [dilation] * ndim
    zeros = [0] * ndim
    out = aten.convolution(x, weight, None, strides, paddings, dilations, False, zeros, groups)
    grad_output = torch.randn_like(out)
    how = (strides, paddings, dilations, False, zeros, groups)
    expected = aten.convolution_backward(grad_output, x, weight, None, *how, [*mask, False])
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        actual = reduced_conv_backward(grad_output, x, weight, *how, list(mask), False)
    calls = [
        event.input_shapes[:2]
        for event in profile.function_events
        if event.name == "aten::convolution_backward"
    ]
    return actual, expected, calls


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": (3, 3)},
        {"kernel": (3, 3), "padding": 0},
        {"kernel": (3, 3), "padding": 2},
        {"kernel": (3, 3), "dilation": 2, "padding": 3},
        {"kernel": (3, 5)},
        {"kernel": (2,), "padding": 0},
        {"kernel": (1, 1), "padding": 0},
        {"kernel": (3, 3, 3)},
        {"kernel": (3, 3), "mask": (False, True)},
    ],
    ids=str,
)
def test_gradients_of_few_channels_a_group_come_from_swapped_roles(
    geometry: dict[str, Any],
) -> None:
    actual, expected, calls = gradients(2, 4, 3, **geometry)
    swapped = [grad_output for grad_output, _ in calls if grad_output[1] == 12]
    assert len(swapped) == 1, "input and grad_output are in each other's place"
    for gradient, reference in zip(actual, expected, strict=False):
        if reference is not None:
            torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-11)


def test_swapped_roles_in_single_precision() -> None:
    """In oneDNN, which has no double precision."""
    actual, expected, calls = gradients(4, 16, 5, (3, 3), dtype=torch.float32)
    assert len(calls) == 2
    for gradient, reference in zip(actual, expected, strict=False):
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel": (3, 3), "stride": 2},
        {"kernel": (3, 3), "padding": 3},
        {"kernel": (1, 1), "padding": 1},
        {"kernel": (3, 3), "mask": (True, False)},
    ],
    ids=str,
)
def test_gradients_come_from_one_call_where_roles_cannot_be_swapped(
    geometry: dict[str, Any],
) -> None:
    actual, expected, calls = gradients(2, 4, 3, **geometry)
    assert len(calls) == 1
    for gradient, reference in zip(actual, expected, strict=False):
        if reference is not None:
            torch.testing.assert_close(gradient, reference, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("channels", "sources", "groups"), [(4, 4, 3), (2, 4, 1), (1, 1, 6)], ids=str
)
def test_roles_stay_where_swapping_gains_nothing(channels: int, sources: int, groups: int) -> None:
    _, _, calls = gradients(channels, sources, groups, (3, 3))
    assert len(calls) == 1
