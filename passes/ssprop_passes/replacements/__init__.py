"""Replacements: the sparse backward of each kind of layer, in plain torch."""
