"""What the tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ssprop_passes.kernels.cpp_loader import kernel_maybe, start_compiling
from training_runs import TWO_PHASES

from ssprop_fx.cli.app import main
from ssprop_fx.compiler.backend import SparseBackend
from ssprop_fx.named_backend.autostep import SteppedVariant
from ssprop_fx.runtime import constant_counts as specialize


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests use their own compile cache, empty at first; the user's does not change."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session", autouse=True)
def freed_memory_goes_back() -> Iterator[None]:
    """Runs and benchmarks never return freed memory: thousands of tests would hold gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("ssprop_fx.training.run", "benchmarks.machine"):
            patch.setattr(f"{module}.keep_freed_memory", lambda: False)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_edit_backend_in_use() -> Iterator[None]:
    """After a test imports the no-edit backend, others get no warning that Dynamo never calls it.

    For the whole session, because session fixtures train, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SteppedVariant, "made", 1)
        yield


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No test sees the graphs, guards or recompile counts of another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_kernel_yet() -> Iterator[None]:
    """Load the C++ kernels again in this test, and forget them after it."""
    for known in (kernel_maybe, start_compiling):
        known.cache_clear()
    yield
    for known in (kernel_maybe, start_compiling):
        known.cache_clear()


@pytest.fixture(autouse=True)
def no_gate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the gate off: layers as small as the tests' are not faster sparse."""
    if request.node.get_closest_marker("gate") is None:
        monkeypatch.setattr(SparseBackend, "_gate", lambda self: None)


@pytest.fixture(autouse=True)
def no_constants(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules with one drop rate would not test keep counts that are read at run time."""
    if request.node.get_closest_marker("specialize") is None:
        monkeypatch.setattr(specialize, "AUTO_LEVELS", -1)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of `TWO_PHASES`."""
    output = tmp_path_factory.mktemp("runs")
    assert main([*TWO_PHASES, "--output", str(output), "--experiment", "whole"]) == 0
    return output / "whole"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable sets the no-edit backend in a test."""
    for variable in [name for name in os.environ if name.startswith("SSPROP_")]:
        monkeypatch.delenv(variable)
