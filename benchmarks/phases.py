"""Steps whose forward and backward are timed apart, in this process or in another checkout's."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch

from benchmarks import machine
from benchmarks.memory import peak_mib
from benchmarks.timing import synchronize
from benchmarks.variants import Variant, make_variants
from benchmarks.workload import Workload
from ssprop_fx import SparsityConfig

__all__ = ["OtherCheckout", "OtherStep", "PhasedStep", "Step", "before_backward"]

CLOCKS: dict[str, Callable[[], float]] = {
    "wall time": time.perf_counter,
    "processor time": time.process_time,
}
# Marks the lines of `_serve`; whatever else the process prints is left out.
_MARK = "reply "


class Step(Protocol):
    """A step that takes turns with others.

    Attributes:
        phases: forward and backward of each step so far, in milliseconds.
    """

    phases: list[tuple[float, float]]

    def __call__(self) -> None:
        """Run the step once."""

    def peak_mib(self) -> float:
        """Return the peak memory of a step."""


@contextmanager
def before_backward(call: Callable[[], object]) -> Iterator[None]:
    """Run a function right before each call of `Tensor.backward`."""
    real_backward = torch.Tensor.backward

    def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        call()
        real_backward(tensor, *args, **kwargs)

    with patch.object(torch.Tensor, "backward", backward):
        yield


class PhasedStep:
    """A variant's step in this process. Its backward begins at the call of `Tensor.backward`.

    Args:
        variant: the variant.
        device: its device.
        clock: returns seconds.
    """

    def __init__(self, variant: Variant, device: str, clock: Callable[[], float]) -> None:
        self.variant = variant
        self.device = device
        self.clock = clock
        self.phases: list[tuple[float, float]] = []

    def __call__(self) -> None:
        """Run the step once."""
        begins: list[float] = []

        def begin() -> None:
            synchronize()
            begins.append(self.clock())

        with before_backward(begin):
            synchronize()
            start = self.clock()
            self.variant.step()
            synchronize()
            end = self.clock()
        self.phases.append((1e3 * (begins[0] - start), 1e3 * (end - begins[0])))

    def peak_mib(self) -> float:
        """Return the peak memory of a step."""
        self.variant.model.zero_grad()
        return peak_mib(self.variant.run, self.device)


class OtherCheckout:
    """A process that runs the sparse variants of another checkout of this project.

    Two versions of a package cannot be in one process.

    Args:
        path: the checkout.
        workload: the workload.
        drop_rates: drop rates of its variants, with `axis="sample"`.
        clock: name of the clock, one of CLOCKS.

    Attributes:
        name: name of the rows, with the commit.
    """

    def __init__(
        self, path: str | Path, workload: Workload, drop_rates: list[float], clock: str
    ) -> None:
        root = Path(path).resolve()
        task = {"workload": asdict(workload), "drop_rates": drop_rates, "clock": clock}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, json.dumps(task)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "passes")))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = f"commit {self._reply()}"

    def __enter__(self) -> "OtherCheckout":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, method: str, drop_rate: float) -> Any:
        """Return what `method`, `"step"` or `"peak"`, returns for the variant at a drop rate."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, drop_rate]) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise RuntimeError("the process of the other checkout ended; its errors are above")


class OtherStep:
    """A step in the process of another checkout.

    Args:
        checkout: the checkout.
        drop_rate: drop rate of the step.
    """

    def __init__(self, checkout: OtherCheckout, drop_rate: float) -> None:
        self._checkout = checkout
        self._drop_rate = drop_rate
        self.phases: list[tuple[float, float]] = []

    def __call__(self) -> None:
        """Run the step once."""
        forward_ms, backward_ms = self._checkout.ask("step", self._drop_rate)
        self.phases.append((forward_ms, backward_ms))

    def peak_mib(self) -> float:
        """Return the peak memory of a step."""
        return float(self._checkout.ask("peak", self._drop_rate))


def _serve(workload: dict[str, Any], drop_rates: list[float], clock: str) -> None:
    """Answer the questions of an `OtherCheckout`. All imports are the other checkout's."""

    def reply(value: Any) -> None:
        print(_MARK + json.dumps(value), flush=True)

    machine.allocator()
    work = Workload(**workload)
    model, images = work.build()
    configs = {"other": SparsityConfig(axis="sample")}
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        variants = make_variants(work, model, images, configs, drop_rates, with_peers=False)
        steps = {
            variant.drop_rate: PhasedStep(variant, work.device, CLOCKS[clock])
            for variant in variants
            if variant.drop_rate
        }
        reply(machine.environment(work.device)["commit"])
        for line in sys.stdin:
            method, drop_rate = json.loads(line)
            step = steps[drop_rate]
            if method == "peak":
                reply(step.peak_mib())
            else:
                step()
                reply(step.phases[-1])


if __name__ == "__main__":
    _serve(**json.loads(sys.argv[1]))
