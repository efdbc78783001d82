"""The kinds of site: one file each, listed here."""

from collections.abc import Callable

from torch import fx

from ssprop_passes.conv import match_conv_backward
from ssprop_passes.linear import match_linear_backward
from ssprop_passes.sites import SiteMatch

__all__ = ["MATCHERS"]

MATCHERS: tuple[Callable[[fx.Node], SiteMatch | None], ...] = (
    match_conv_backward,
    match_linear_backward,
)
