"""Energy, with a fake zeus."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from training_runs import TINY, content, rows

from ssprop_fx.cli.app import main
from ssprop_fx.training.distributed import Processes
from ssprop_fx.training.energy import Energy, EnergyMeter


class FakeMonitor:
    """A ZeusMonitor with the requested GPUs and one CPU, at 10 and 3 J per window."""

    has_cpu = True
    has_memory = False
    power_monitor = None

    def __init__(self, gpu_indices=None, cpu_indices=None, approx_instant_energy=False):
        assert not approx_instant_energy
        self.gpu_indices = [0, 1] if gpu_indices is None else gpu_indices
        self.cpu_indices = [0] if self.has_cpu else []
        self.open = set()
        self.windows = 0

    def begin_window(self, key, sync_execution=True):
        assert key not in self.open
        self.open.add(key)

    def end_window(self, key, sync_execution=True, cancel=False):
        self.open.remove(key)
        self.windows += 1
        return SimpleNamespace(
            time=1.0,
            gpu_energy=dict.fromkeys(self.gpu_indices, 10.0),
            cpu_energy={0: 3.0} if self.has_cpu else None,
            dram_energy={0: 0.5} if self.has_memory else None,
        )


@pytest.fixture
def zeus(monkeypatch):
    """Replaces zeus's monitor with a class."""

    def put(monitor):
        module = ModuleType("zeus.monitor")
        module.ZeusMonitor = monitor
        monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
        monkeypatch.setitem(sys.modules, "zeus.monitor", module)
        return monitor

    return put


def _measure(processes=None, **kwargs):
    meter = EnergyMeter(processes or Processes(), **kwargs)
    meter.begin()
    return meter.end(), meter.reason


def _is_nothing(energy):
    return math.isnan(energy.gpu) and math.isnan(energy.cpu)


@pytest.mark.parametrize(
    ("device", "local_size", "gpu"), [("cuda:1", 1, 10.0), ("cuda", 1, 10.0), ("cuda:0", 4, 40.0)]
)
def test_the_gpus_of_the_run_and_the_cpu_are_measured(zeus, device, local_size, gpu):
    zeus(FakeMonitor)
    processes = Processes(world_size=local_size, local_size=local_size, device=torch.device(device))
    assert _measure(processes) == (Energy(gpu=gpu, cpu=3.0), "")


def test_what_has_no_counter_is_not_available(zeus):
    zeus(FakeMonitor)
    energy, reason = _measure()
    assert (math.isnan(energy.gpu), energy.cpu, reason) == (True, 3.0, "")
    zeus(type("WithMemory", (FakeMonitor,), {"has_memory": True}))
    assert _measure()[0].cpu == 3.5


def _fail(*args, **kwargs):
    raise RuntimeError("no NVML here")


@pytest.mark.parametrize(
    ("monitor", "reason"),
    [
        (type("Blind", (FakeMonitor,), {"has_cpu": False}), "the machine has no energy counter"),
        (type("Old", (FakeMonitor,), {"power_monitor": object()}), "the GPU has no energy counter"),
        (_fail, "zeus cannot measure here: no NVML here"),
    ],
)
def test_nothing_is_estimated(zeus, monitor, reason):
    zeus(monitor)
    energy, found = _measure()
    assert _is_nothing(energy)
    assert found.startswith(reason)


def test_without_zeus_or_on_several_machines_energy_is_not_available(zeus, monkeypatch):
    zeus(FakeMonitor)
    for kwargs, reason in (
        ({"enabled": False}, "turned off"),
        ({"processes": Processes(world_size=4, local_size=2)}, "the run is on several machines"),
        # Another process on the machine measures.
        ({"processes": Processes(rank=1, world_size=2, local_size=2)}, ""),
    ):
        energy, found = _measure(**kwargs)
        assert (_is_nothing(energy), found) == (True, reason)
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    energy, found = _measure()
    assert (_is_nothing(energy), found) == (
        True,
        "zeus is missing: pip install ssprop-fx[energy]",
    )


def test_a_run_keeps_its_joules_and_goes_on_counting_when_resumed(zeus, tmp_path, capsys):
    zeus(FakeMonitor)
    flags = ["--epochs", "1", "--schedule", "none", "--output", str(tmp_path), "--experiment", "a"]
    # One window up to the checkpoint after step 2, and one after it.
    assert main([*TINY, *flags, "--max-steps", "3", "--checkpoint-every", "2"]) == 0
    assert "energy: CPU 6 J" in capsys.readouterr().out
    assert content(tmp_path / "a" / "last.pt")["cpu_joules"] == 6.0
    assert main(["train", "--resume", str(tmp_path / "a"), "--max-steps", "4"]) == 0
    (row,) = rows(tmp_path / "a" / "summary.csv")
    assert (row["cpu_joules"], row["gpu_joules"]) == ("9.0", "nan")


def test_a_run_says_that_energy_is_not_available(tmp_path, capsys):
    flags = ["--epochs", "1", "--schedule", "none", "--max-steps", "1", "--no-energy"]
    assert main([*TINY, *flags, "--output", str(tmp_path)]) == 0
    assert "energy: not available (turned off)" in capsys.readouterr().out
