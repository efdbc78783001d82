"""Transforms: the passes on the AOTAutograd joint graph."""
