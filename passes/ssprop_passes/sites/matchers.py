"""The kinds of site, listed here: a file each for what finds them, and for their arithmetic."""

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
