"""Gradients: what every replacement returns."""

from torch import Tensor

__all__ = ["Gradients"]

# Full-size gradients of input, weight and bias; None if not wanted.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
