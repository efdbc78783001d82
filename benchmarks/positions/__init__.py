"""Positions, a third axis: layers whose gradients come from some positions, and what they save."""
