"""The list of the kinds of site; each has one file that finds it and one for its arithmetic."""

from collections.abc import Callable

from torch import fx

from ssprop_passes.sites.conv_match import match_conv_backward
from ssprop_passes.sites.linear_match import match_linear_backward
from ssprop_passes.sites.match import SiteMatch

__all__ = ["MATCHERS"]

MATCHERS: tuple[Callable[[fx.Node], SiteMatch | None], ...] = (
    match_conv_backward,
    match_linear_backward,
)
