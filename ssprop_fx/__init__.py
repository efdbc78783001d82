"""Scheduled sparse back-propagation for any torch model, as a torch.compile graph pass."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssprop_passes.errors import CaptureError, NoEffectWarning, SsPropCompileError

from ssprop_fx.analysis.depth_rates import by_depth
from ssprop_fx.analysis.inspection import Inspection, inspect_sites
from ssprop_fx.analysis.report import Report, report
from ssprop_fx.compile import ssprop_compile
from ssprop_fx.config import SparsityConfig
from ssprop_fx.integrations.ddp import KeptRows, kept_rows_hook
from ssprop_fx.integrations.optimizer import freeze_dropped
from ssprop_fx.logs import configure_logging
from ssprop_fx.scheduling import schedules as _schedules
from ssprop_fx.scheduling.base import Schedule
from ssprop_fx.scheduling.combine import join, warmup
from ssprop_fx.scheduling.controllers import AddedError, Controller, KeptMass, Seen
from ssprop_fx.scheduling.sample_rules import (
    AddedNoise,
    SampleRule,
    SampleTelemetry,
    default_rule,
)
from ssprop_fx.scheduling.scheduler import SparsityScheduler
from ssprop_fx.scheduling.schedules import *  # noqa: F403
from ssprop_fx.scheduling.telemetry import SiteTelemetry

if TYPE_CHECKING:
    from ssprop_passes.transforms.depthwise_layout import DepthwiseLayoutPass
    from ssprop_passes.transforms.global_max import GlobalMaxPass
    from ssprop_passes.transforms.two_step_sums import TwoStepSumsPass

    from ssprop_fx.runtime.module import SsPropModule

__all__ = [
    "AddedError",
    "AddedNoise",
    "CaptureError",
    "Controller",
    "DepthwiseLayoutPass",
    "GlobalMaxPass",
    "Inspection",
    "KeptMass",
    "KeptRows",
    "NoEffectWarning",
    "Report",
    "SampleRule",
    "SampleTelemetry",
    "Schedule",
    "Seen",
    "SiteTelemetry",
    "SparsityConfig",
    "SparsityScheduler",
    "SsPropCompileError",
    "SsPropModule",
    "TwoStepSumsPass",
    "by_depth",
    "default_rule",
    "freeze_dropped",
    "inspect_sites",
    "join",
    "kept_rows_hook",
    "report",
    "ssprop_compile",
    "warmup",
]
__all__ += _schedules.__all__

__version__ = "0.1.0"

# They import the compiler, which takes seconds: only when they are asked for.
_ON_DEMAND = {
    "SsPropModule": "ssprop_fx.runtime.module",
    "DepthwiseLayoutPass": "ssprop_passes.transforms.depthwise_layout",
    "GlobalMaxPass": "ssprop_passes.transforms.global_max",
    "TwoStepSumsPass": "ssprop_passes.transforms.two_step_sums",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_DEMAND[name]), name)


configure_logging(os.environ)
