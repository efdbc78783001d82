"""Gradients of a reduced convolution, with the weight's by our kernel, compared with ATen's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ssprop_passes.kernels import operators
from ssprop_passes.kernels.operators import reduced_conv_backward
from torch import Tensor
from torch._inductor.codecache import CppCodeCache

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor decides which gradients our kernel computes; any processor can run it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


def gradients(
    channels: int,
    sources: int,
    groups: int,
    kernel: tuple[int, ...] = (3, 3),
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (1, 1),
    dilation: tuple[int, ...] = (1, 1),
    space: tuple[int, ...] = (9, 10),
    mask: tuple[bool, bool] = (True, True),
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    batch: int = 3,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[list[bool]]]:
    """Return the operator's gradients, ATen's in float64, and the masks of the ATen calls it makes.

    Values are small integers: their products and sums are exact in each precision.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    ndim = len(kernel)

    def integers(*shape: int) -> Tensor:
        x = torch.randint(-2, 3, shape).double()
        return x.contiguous(memory_format=layout)

    x, weight = (
        integers(batch, sources * groups, *space),
        integers(channels * groups, sources, *kernel),
    )
    how = (list(stride), list(padding), list(dilation), False, [0] * ndim, groups)
    grad_output = integers(*aten.convolution(x, weight, None, *how).shape)
    expected = aten.convolution_backward(grad_output, x, weight, None, *how, [*mask, False])
    masks: list[list[bool]] = []

    def convolution_backward(*args: Any) -> Any:
        masks.append(args[-1][:2])
        return aten.convolution_backward(*args)

    tensors = [tensor.to(dtype) for tensor in (grad_output, x, weight)]
    with pytest.MonkeyPatch.context() as patch:
        spy = SimpleNamespace(convolution_backward=convolution_backward)
        patch.setattr(operators, "aten", spy)
        actual = reduced_conv_backward(*tensors, *how, list(mask), channels_last and ndim == 2)
    return actual, expected, masks


def check(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Sums below 256 are exact in bfloat16; larger ones are rounded once."""
    for gradient, reference in zip(actual, expected, strict=False):
        if reference is not None:
            torch.testing.assert_close(gradient, reference.to(gradient.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"mask": (False, True)},
        {"padding": (0, 0)},
        {"padding": (3, 4)},
        {"stride": (2, 2)},
        {"stride": (2, 3), "padding": (0, 2)},
        {"dilation": (2, 3), "padding": (2, 0)},
        {"kernel": (1, 2), "padding": (1, 1), "stride": (3, 3)},
        {"kernel": (3, 5)},
        {"kernel": (7, 7), "padding": (3, 3)},
        {"kernel": (2, 4), "stride": (2, 1)},
        {"space": (1, 1)},
        {"space": (3, 2), "padding": (5, 5)},
        {"space": (2, 2), "kernel": (5, 5), "padding": (4, 4), "dilation": (2, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(3, 16, 5), (7, 40, 1)], ids=["groups", "one group"])
def test_weight_gradient_is_not_atens(
    sizes: tuple[int, int, int], geometry: dict[str, Any], dtype: torch.dtype
) -> None:
    mask = geometry.get("mask", (True, True))
    actual, expected, masks = gradients(*sizes, dtype=dtype, **geometry)
    assert masks == ([[True, False]] if mask[0] else [])
    check(actual, expected)
    assert actual[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sources", [4, 8, 12, 24, 32, 40, 48])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 7, 8])
def test_any_count_of_kept_and_input_channels(channels: int, sources: int) -> None:
    """This covers full and partial blocks, of two vectors and of taps, and tiles of each size."""
    actual, expected, masks = gradients(channels, sources, 2, stride=(2, 2))
    assert masks == [[True, channels >= sources]]
    check(actual, expected)


@pytest.mark.parametrize("sources", [16, 17, 24, 33, 64])
@pytest.mark.parametrize("channels", [1, 6, 13, 25, 70])
def test_any_count_of_channels_without_groups(channels: int, sources: int) -> None:
    actual, expected, masks = gradients(channels, sources, 1)
    assert masks == [[True, False]]
    check(actual, expected)


@pytest.mark.parametrize("space", [(40, 30), (2, 600), (600, 2)])
def test_an_image_of_several_pieces(space: tuple[int, int]) -> None:
    """Each piece of a sample uses input rows that belong to its neighbours."""
    actual, expected, masks = gradients(2, 16, 1, space=space)
    assert masks == [[True, False]]
    check(actual, expected)


@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("groups", [1, 3])
def test_threads_share_the_work(threads: int, groups: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual, expected, masks = gradients(3, 16, groups)
    finally:
        torch.set_num_threads(before)
    assert masks == [[True, False]]
    check(actual, expected)


def test_not_finite_gradients_stay_so() -> None:
    """A `GradScaler` looks for them."""
    x = torch.ones(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    grad_output = torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    grad_output[0, 0, 1, 1], grad_output[0, 1, 1, 1] = torch.nan, torch.inf
    weight = torch.ones(2, 4, 1, 1)
    how = ([1, 1], [0, 0], [1, 1], False, [0, 0], 2, [False, True], True)
    _, grad_weight = reduced_conv_backward(grad_output, x, weight, *how)
    assert grad_weight[0].isnan().all()
    assert (grad_weight[1] == torch.inf).all()


@pytest.mark.parametrize(
    "case",
    [
        {"channels": 4, "sources": 4, "groups": 3},
        {"channels": 2, "sources": 6, "groups": 3},
        {"channels": 2, "sources": 15, "groups": 1},
        {"channels": 1, "sources": 1, "groups": 6},
        {"channels": 2, "sources": 4, "groups": 3, "dtype": torch.float64},
        {"channels": 2, "sources": 4, "groups": 3, "channels_last": False},
        {"channels": 2, "sources": 4, "groups": 3, "mask": (True, False)},
        {"channels": 2, "sources": 16, "groups": 1, "batch": 0},
    ],
    ids=str,
)
def test_what_the_kernel_does_not_take_is_one_call_of_atens(case: dict[str, Any]) -> None:
    actual, expected, masks = gradients(**case)
    assert masks == [list(case.get("mask", (True, True)))]
    check(actual, expected)


@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_in_single_precision_are_atens(dtype: torch.dtype, groups: int) -> None:
    """1x1 convolutions without padding have their own test."""
    actual, expected, masks = gradients(
        3, 16, groups, kernel=(1, 1), padding=(1, 1), stride=(3, 3), dtype=dtype
    )
    assert masks == [[True, groups == 1 and dtype == torch.float32]]
    check(actual, expected)


PRODUCT = {"kernel": (1, 1), "padding": (0, 0)}


@pytest.mark.parametrize(
    ("sizes", "case", "is_ours"),
    [
        ((15, 16, 3), {}, True),
        ((16, 16, 3), {}, False),
        ((10, 16, 3), {"dtype": torch.bfloat16}, True),
        ((11, 16, 3), {"dtype": torch.bfloat16}, False),
        ((15, 16, 1), {}, True),
        ((16, 16, 1), {}, False),
        ((16, 128, 1), {}, True),
        ((15, 128, 1), {"dtype": torch.bfloat16}, False),
        ((16, 128, 1), {**PRODUCT, "space": (9, 9)}, False),
        ((16, 16, 1), {**PRODUCT, "space": (8, 8)}, True),
        ((16, 16, 1), {**PRODUCT, "space": (18, 18), "stride": (1, 2)}, True),
        ((15, 15, 1), {"stride": (2, 2)}, False),
    ],
    ids=str,
)
def test_with_avx512_fewer_are_ours(
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int, int],
    case: dict[str, Any],
    is_ours: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    actual, expected, masks = gradients(*sizes, **case)
    assert masks == [[True, not is_ours]]
    check(actual, expected)


@pytest.mark.parametrize(
    "case",
    [
        {"kernel": (3,), "stride": (1,), "padding": (1,), "dilation": (1,), "space": (9,)},
        {
            "kernel": (3, 3, 3),
            "stride": (1, 1, 1),
            "padding": (1, 1, 1),
            "dilation": (1, 1, 1),
            "space": (4, 4, 4),
        },
    ],
    ids=["conv1d", "conv3d"],
)
def test_other_dimensions_are_atens(case: dict[str, Any]) -> None:
    actual, expected, masks = gradients(2, 4, 3, channels_last=False, **case)
    assert masks == [[True, True]]
    check(actual, expected)


@pytest.mark.usefixtures("no_kernel_yet")
def test_a_kernel_that_does_not_compile_is_told_and_not_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(source: str) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    with pytest.warns(UserWarning, match="does not compile.*no compiler"):
        actual, expected, masks = gradients(3, 16, 5)
    assert masks == [[True, True]]
    check(actual, expected)
