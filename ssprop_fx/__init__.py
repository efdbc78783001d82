"""Scheduled sparse back-propagation for any torch model, as a torch.compile graph pass."""

from ssprop_passes.errors import CaptureError, NoEffectWarning, SsPropCompileError

from ssprop_fx.compile import ssprop_compile
from ssprop_fx.config import SparsityConfig
from ssprop_fx.inspection import Inspection, inspect_sites
from ssprop_fx.report import Report, report
from ssprop_fx.scheduler import SparsityScheduler
from ssprop_fx.schedules import Schedule, bar, constant, cosine, join, linear, warmup

__all__ = [
    "CaptureError",
    "Inspection",
    "NoEffectWarning",
    "Report",
    "Schedule",
    "SparsityConfig",
    "SparsityScheduler",
    "SsPropCompileError",
    "bar",
    "constant",
    "cosine",
    "inspect_sites",
    "join",
    "linear",
    "report",
    "ssprop_compile",
    "warmup",
]

__version__ = "0.1.0"
