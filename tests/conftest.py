"""What the tests share."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ssprop_passes.kernels.cpp_loader import kernel_maybe, start_compiling
from torch import fx
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed import HashStore, destroy_process_group, init_process_group
from training_runs import TWO_PHASES

from ssprop_fx.cli.app import main
from ssprop_fx.compiler.backend import SparseBackend
from ssprop_fx.named_backend import progress
from ssprop_fx.named_backend.autostep import SteppedVariant
from ssprop_fx.runtime import constant_counts as specialize


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests use their own compile cache, empty at first; the user's does not change.

    All worker processes of a run share it, because Inductor's first compile in an empty cache tries
    out the C++ compiler for half a minute.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
        yield


@pytest.fixture(scope="session", autouse=True)
def garbage_is_collected_less_often() -> Iterator[None]:
    """The compiler makes millions of objects, and Python looks through all of them each time."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


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


@pytest.fixture(scope="session", autouse=True)
def no_progress_lines() -> None:
    """Not a line at the end of the session for each model of a test."""
    progress.logger.addHandler(logging.NullHandler())


@pytest.fixture(autouse=True)
def loggers_are_on() -> None:
    """The test of the layout runs import-linter, which turns all existing loggers off."""
    for name, logger in logging.Logger.manager.loggerDict.items():
        if name.startswith("ssprop") and isinstance(logger, logging.Logger):
            logger.disabled = False


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


@pytest.fixture
def process_group() -> Iterator[None]:
    """A process group of one process."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse graphs run eagerly where Inductor would generate code, which takes seconds."""

    def run_eagerly(gm: fx.GraphModule, *args: object, **kwargs: object) -> Callable[..., object]:
        return make_boxed_func(gm.forward)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", run_eagerly)


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
