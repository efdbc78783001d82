"""A thread compiles the C++ kernels while a graph with convolutions is lowered."""

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ssprop_passes.kernels.cpp_loader import COUNT, POINTER, kernel_maybe, start_compiling
from torch import nn
from torch._inductor.codecache import CppCodeCache

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile

NAMES = ("conv_grad_weight", "gather_norm_gradient")

pytestmark = pytest.mark.usefixtures("no_kernel_yet")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list with an entry for each requested library: kernel name and thread name."""
    asked: list[tuple[str, str]] = []
    load: Callable[..., ctypes.CDLL] = CppCodeCache.load

    def record(source: str) -> ctypes.CDLL:
        (name,) = (
            n for n in ("conv_grad_weight", "gather_norm_gradient") if f"void {n}(" in source
        )
        asked.append((name, threading.current_thread().name))
        return load(source)

    monkeypatch.setattr(CppCodeCache, "load", record)
    return asked


def test_all_kernels_are_compiled_on_one_thread(loaded: list[tuple[str, str]]) -> None:
    thread = start_compiling()
    assert start_compiling() is thread
    thread.join()
    assert loaded == [(name, "ssprop kernels") for name in NAMES]


def test_errors_are_left_to_who_asks_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    start_compiling().join()
    with pytest.warns(UserWarning, match="conv_grad_weight does not compile.*no compiler"):
        assert kernel_maybe("conv_grad_weight", *[POINTER] * 4, COUNT, COUNT) is None


def test_the_thread_has_the_settings_of_who_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        CppCodeCache, "load", lambda source: seen.append(torch._inductor.config.cpp.simdlen)
    )
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        start_compiling().join()
    assert seen == [1, 1]


@pytest.mark.parametrize(
    ("layer", "shape", "is_due"),
    [
        (nn.Conv2d(8, 32, 3), (2, 8, 6, 6), True),
        (nn.Linear(8, 32), (2, 8), False),
    ],
)
def test_graphs_with_convolutions_have_them_compiled(
    layer: nn.Module, shape: tuple[int, ...], is_due: bool, loaded: list[tuple[str, str]]
) -> None:
    model = ssprop_compile(
        nn.Sequential(layer),
        SparsityScheduler(constant(0.5)),
        config=SparsityConfig(targets=("conv", "linear")),
    )
    model(torch.randn(shape)).sum().backward()
    assert (start_compiling.cache_info().currsize == 1) == is_due
    start_compiling().join()
