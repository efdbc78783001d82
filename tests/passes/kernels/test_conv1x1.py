"""Gradients of a 1x1 convolution from all positions at once, compared with ATen's."""

from typing import Any

import pytest
import torch
from ssprop_passes.kernels import conv1x1
from ssprop_passes.kernels.operators import reduced_conv_backward
from torch import Tensor

aten = torch.ops.aten

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def _one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of the convolutions that `conv1x1_backward` calls."""
    found: list[Tensor] = []

    class Spy:
        @staticmethod
        def convolution_backward(grad_output: Tensor, input: Tensor, *args: Any) -> Any:
            found.append(input)
            return aten.convolution_backward(grad_output, input, *args)

    monkeypatch.setattr(conv1x1, "aten", Spy)
    return found


def check(
    space: tuple[int, ...] = (6, 7),
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    mask: tuple[bool, bool] = (True, True),
    kernel: int = 1,
    groups: int = 1,
    batch: int = 3,
    channels: tuple[int, int] = (5, 8),
    dtype: torch.dtype = torch.float32,
    is_last: bool = True,
) -> None:
    """Compare the operator with ATen in float64, on small integers, whose sums are exact."""
    torch.manual_seed(0)
    ndim = len(space)
    layout = LAYOUTS[ndim] if is_last else torch.contiguous_format

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape).double().contiguous(memory_format=layout)

    outputs, sources = channels
    x = integers(batch, sources * groups, *space)
    weight = integers(outputs * groups, sources, *[kernel] * ndim)
    how = [list(stride), list(padding), [1] * ndim, False, [0] * ndim, groups]
    grad_output = integers(*aten.convolution(x, weight, None, *how).shape)
    expected = aten.convolution_backward(grad_output, x, weight, None, *how, [*mask, False])
    tensors = [tensor.to(dtype) for tensor in (grad_output, x, weight)]
    actual = reduced_conv_backward(*tensors, *how, list(mask), is_last)
    for gradient, reference, wanted in zip(actual, expected, mask, strict=False):
        if wanted:
            torch.testing.assert_close(gradient, reference.to(dtype), rtol=0, atol=0)
            assert gradient.is_contiguous(memory_format=layout)


POINTWISE: list[dict[str, Any]] = [
    {},
    {"mask": (True, False)},
    {"mask": (False, True)},
    {"stride": (2, 2)},
    {"stride": (2, 3), "mask": (True, False)},
    {"stride": (1, 4), "space": (1, 1)},
    {"stride": (9, 9)},
    {"stride": (1, 7)},
    {"batch": 1},
    {"channels": (1, 8)},
    {"channels": (5, 1)},
    {"channels": (1, 1)},
    {"space": (1, 1)},
    {"space": (2, 3, 4), "stride": (1, 1, 1), "padding": (0, 0, 0)},
    {"space": (2, 3, 4), "stride": (2, 1, 3), "padding": (0, 0, 0)},
]


@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_positions_are_one_image(case: dict[str, Any], images: list[Tensor]) -> None:
    check(**case)
    (image,) = images
    space, stride = case.get("space", (6, 7)), case.get("stride", (1, 1))
    positions = 1
    for size, step in zip(space, stride, strict=True):
        positions *= -(-size // step)
    batch, (_, sources) = case.get("batch", 3), case.get("channels", (5, 8))
    assert image.shape == (1, sources, batch, positions)
    assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that `conv1x1_backward` multiplies as matrices, on a processor with bfloat16."""
    found: list[Tensor] = []
    by_products = conv1x1._by_products

    def spy(dy: Tensor, x: Tensor, *args: Any) -> Any:
        found.append(x)
        return by_products(dy, x, *args)

    monkeypatch.setattr(conv1x1, "_by_products", spy)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return found


@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_positions_are_rows_in_bfloat16(case: dict[str, Any], rows: list[Tensor]) -> None:
    check(**case, dtype=torch.bfloat16)
    assert len(rows) == 1


@pytest.mark.parametrize(
    "case",
    [
        {"kernel": 2},
        {"padding": (0, 1)},
        {"groups": 2},
        {"batch": 0},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"is_last": False},
    ],
    ids=str,
)
def test_other_convolutions_are_not(case: dict[str, Any], images: list[Tensor]) -> None:
    check(**case)
    assert not images


@pytest.mark.parametrize("case", [{"kernel": 2}, {"groups": 2}, {"is_last": False}], ids=str)
def test_nor_in_bfloat16(case: dict[str, Any], rows: list[Tensor]) -> None:
    check(**case, dtype=torch.bfloat16)
    assert not rows


def test_with_avx512_they_are_not(images: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    check()
    assert not images
