"""Lets `python -m ssprop_fx.cli` stand for `ssprop-fx`."""

import sys

from ssprop_fx.cli.app import main

sys.exit(main())
