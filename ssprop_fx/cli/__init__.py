"""The command `ssprop-fx`."""

from ssprop_fx.cli.app import main

__all__ = ["main"]
