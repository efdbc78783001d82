"""The code of a sparse step for a GPU: what it reads and writes, and that it compiles.

This needs no GPU. Tests with the marker `gpu` run the code on one and check that it is right.
"""

import math
import re
from functools import cache

import pytest
import timm
import torch
from gpu_lowering import Lowered, compile_kernels, lower
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from ssprop_fx import SparsityConfig

pytest.importorskip("triton")

pytestmark = pytest.mark.slow


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "without norms":
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Flatten(), nn.Linear(576, 10))
    # One block of each stage, and one more whose residual is not a convolution.
    short = {"layers": (2, 1, 1, 1)} if name == "resnet50" else {}
    return timm.create_model(name, num_classes=10, **short).to(memory_format=torch.channels_last)


def images(img_size: int) -> Tensor:
    return torch.randn(8, 3, img_size, img_size).to(memory_format=torch.channels_last)


@cache
def lowered(name: str, img_size: int, is_sparse: bool, autocast: bool = True) -> Lowered:
    targets = ("linear",) if "vit" in name else ("conv", "depthwise")
    config = SparsityConfig(gate=False, specialize=False, targets=targets)
    return lower(build(name), images(img_size), config if is_sparse else None, autocast)


@cache
def lowered_samples(name: str, img_size: int, saved: str) -> Lowered:
    return lower(build(name), images(img_size), SparsityConfig(axis="sample", saved=saved))


SAVED = pytest.mark.parametrize("saved", ["all", "kept"])
MODELS = pytest.mark.parametrize(
    ("name", "img_size"), [("test_resnet", 64), ("test_vit", 160), ("test_efficientnet", 64)]
)


@MODELS
def test_the_backward_takes_nothing_of_the_cpu(name: str, img_size: int) -> None:
    """The forward reads keep counts on the CPU, so no step waits for the GPU."""
    step = lowered(name, img_size, True)
    assert step.devices == [{"cpu", "cuda"}, {"cuda"}]
    assert "ssprop" in step.graphs[1]


@MODELS
def test_kernels_compile(name: str, img_size: int) -> None:
    assert compile_kernels(lowered(name, img_size, True)) > 20


@SAVED
@MODELS
def test_a_sliced_backward_takes_nothing_of_the_cpu(name: str, img_size: int, saved: str) -> None:
    assert shapes_on_the_cpu(lowered_samples(name, img_size, saved).graphs[1]) <= {"2"}


def test_the_kept_samples_are_on_the_gpu() -> None:
    """Also where the number of the choice is the first input: in bf16, without norms."""
    step = lowered_samples("without norms", 8, "all")
    assert shapes_on_the_cpu(step.graphs[1]) <= {"2"}
    assert compile_kernels(step) > 0


def shapes_on_the_cpu(backward: str) -> set[str]:
    """Shapes of the inputs on the CPU. One of shape [2] is the number of the choice, not read."""
    assert "rand_strided(" in backward
    return set(re.findall(r"rand_strided\(\(([^)]*?),? \), \([^)]*\), device='cpu'", backward))


@SAVED
@MODELS
def test_kernels_of_a_sliced_backward_compile(name: str, img_size: int, saved: str) -> None:
    assert compile_kernels(lowered_samples(name, img_size, saved)) > 20


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_gradients_of_norms_are_not_written(autocast: bool) -> None:
    """The dense step writes one for each norm; the sparse step writes only the other tensors."""

    def written(is_sparse: bool) -> int:
        of_backward = lowered("resnet50", 64, is_sparse, autocast).written[1]
        sizes = [size for size, _ in of_backward if len(size) == 4 and size[0] == "8"]
        return sum(math.prod(map(int, size)) for size in sizes if "".join(size).isdigit())

    norms: list[int] = []
    model = build("resnet50")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _module, _args, out: norms.append(out.numel()))
    model(images(64))
    rest = written(False) - sum(norms)
    assert 0 < rest < written(False) / 4
    assert written(True) < 1.1 * rest


@pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.12"),
    reason="torch 2.11 writes some in single precision first",
)
def test_kept_channels_are_written_once() -> None:
    """The kernel that gathers them writes the precision that the reduced convolution reads."""
    step = lowered("test_resnet", 64, True)
    kept = [
        dtype
        for size, dtype in step.written[1]
        if len(size) == 4 and any(re.match(r"u\d", part) for part in size)
    ]
    sites = step.graphs[1].count("torch.ops.ssprop.conv_backward.default(")
    assert kept == sites * [torch.bfloat16]


def test_depthwise_backwards_stay_in_channels_last() -> None:
    """Dense code of torch 2.14 has a copy in the order [N, H, C, W] for each of them."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32)
    )
    model, x = model.to(memory_format=torch.channels_last), images(32)
    order = "(8, 32, 32, 32), (32768, 32, 1024, 1)"
    if torch.__version__ >= TorchVersion("2.14"):
        assert order in lower(model, x, None).graphs[1]
    (_, backward) = lower(model, x, SparsityConfig(axis="sample")).graphs
    assert "ssprop.conv_backward" in backward
    assert "32, 1024, 1)" not in backward
