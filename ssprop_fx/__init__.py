"""Scheduled sparse back-propagation for any torch model, as a torch.compile graph pass."""

from ssprop_passes.errors import CaptureError, NoEffectWarning, SsPropCompileError

from ssprop_fx.analysis.depth_rates import by_depth
from ssprop_fx.analysis.inspection import Inspection, inspect_sites
from ssprop_fx.analysis.report import Report, report
from ssprop_fx.compile import ssprop_compile
from ssprop_fx.config import SparsityConfig
from ssprop_fx.integrations.optimizer import freeze_dropped
from ssprop_fx.scheduling import schedules as _schedules
from ssprop_fx.scheduling.base import Schedule
from ssprop_fx.scheduling.combine import join, warmup
from ssprop_fx.scheduling.controllers import AddedError, KeptMass
from ssprop_fx.scheduling.scheduler import SparsityScheduler
from ssprop_fx.scheduling.schedules import *  # noqa: F403
from ssprop_fx.scheduling.telemetry import SiteTelemetry

__all__ = [
    "AddedError",
    "CaptureError",
    "Inspection",
    "KeptMass",
    "NoEffectWarning",
    "Report",
    "Schedule",
    "SiteTelemetry",
    "SparsityConfig",
    "SparsityScheduler",
    "SsPropCompileError",
    "by_depth",
    "freeze_dropped",
    "inspect_sites",
    "join",
    "report",
    "ssprop_compile",
    "warmup",
]
__all__ += _schedules.__all__

__version__ = "0.1.0"
