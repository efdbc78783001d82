"""Scheduled sparse back-propagation for any torch model, as a torch.compile graph pass."""

from ssprop_passes.errors import CaptureError, NoEffectWarning, SsPropCompileError

from ssprop_fx.compile import ssprop_compile
from ssprop_fx.config import SparsityConfig
from ssprop_fx.controllers import AddedError, KeptMass
from ssprop_fx.depth import by_depth
from ssprop_fx.freezing import freeze_dropped
from ssprop_fx.inspection import Inspection, inspect_sites
from ssprop_fx.report import Report, report
from ssprop_fx.scheduler import SparsityScheduler
from ssprop_fx.schedules import Schedule, bar, constant, cosine, join, linear, warmup
from ssprop_fx.telemetry import SiteTelemetry

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
    "bar",
    "by_depth",
    "constant",
    "cosine",
    "freeze_dropped",
    "inspect_sites",
    "join",
    "linear",
    "report",
    "ssprop_compile",
    "warmup",
]

__version__ = "0.1.0"
