"""The command `ssprop-fx`."""
