"""EnergyMeter: the joules that training used, if the machine counts them."""

import math
import os
from dataclasses import dataclass
from typing import Any

from ssprop_fx.training.distributed import Processes

__all__ = ["Energy", "EnergyMeter"]

_WINDOW = "ssprop-fx train"


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Joules; NaN without a counter.

    Attributes:
        gpu: joules of the GPUs that the run uses.
        cpu: joules of all CPU packages of the machine, and of their memory if it has a counter.
    """

    gpu: float = math.nan
    cpu: float = math.nan


class EnergyMeter:
    """Measures energy with zeus (https://ml.energy/zeus) between `begin` and `end`.

    It reads only hardware counters; a part without a counter gives NaN. The first process of a run
    reads the counters of the machine; a run on several machines is not measured.

    Args:
        processes: processes of the run.
        enabled: False measures nothing.

    Attributes:
        reason: why nothing is measured; "" otherwise.

    Examples:
        >>> meter = EnergyMeter(Processes(), enabled=False)
        >>> meter.begin()
        >>> meter.end()
        Energy(gpu=nan, cpu=nan)
    """

    def __init__(self, processes: Processes, *, enabled: bool = True) -> None:
        self._monitor: Any = None
        self.reason = ""
        if not enabled:
            self.reason = "turned off"
        elif processes.world_size != processes.local_size:
            self.reason = "the run is on several machines"
        elif processes.is_first:
            self._monitor, self.reason = _create_monitor(processes)

    def begin(self) -> None:
        """Begin to measure."""
        if self._monitor is not None:
            self._monitor.begin_window(_WINDOW)

    def end(self) -> Energy:
        """Return the joules used since `begin`."""
        if self._monitor is None:
            return Energy()
        measured = self._monitor.end_window(_WINDOW)
        # Fewer machines count memory than packages, and none counts memory alone.
        return Energy(
            gpu=_total(measured.gpu_energy),
            cpu=_total(measured.cpu_energy) + sum((measured.dram_energy or {}).values()),
        )


def _create_monitor(processes: Processes) -> tuple[Any, str]:
    # zeus reads this when it is imported; by default it logs each monitor that it makes.
    os.environ.setdefault("ZEUS_LOG_LEVEL", "WARNING")
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError:
        return None, "zeus is missing: pip install ssprop-fx[energy]"
    index = processes.device.index or 0
    one_each = list(range(processes.local_size))
    gpus = [] if processes.device.type != "cuda" else [index] if len(one_each) == 1 else one_each
    try:
        monitor = ZeusMonitor(gpu_indices=gpus, approx_instant_energy=False)
    except Exception as error:
        # NVML, permission and driver errors share no base class.
        return None, f"zeus cannot measure here: {error}"
    if getattr(monitor, "power_monitor", None) is not None:
        # On GPUs older than Volta, zeus would integrate samples of the power.
        return None, "the GPU has no energy counter"
    if not monitor.gpu_indices and not monitor.cpu_indices:
        return None, "the machine has no energy counter that this process may read"
    return monitor, ""


def _total(joules: dict[int, float] | None) -> float:
    return sum(joules.values()) if joules else math.nan
