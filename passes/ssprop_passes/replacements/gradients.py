"""Gradients: what every replacement returns."""

from torch import Tensor

__all__ = ["Gradients"]

# Of input, weight and bias, at full size; None where not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
