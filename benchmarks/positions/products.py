"""The weight gradients of a model's layers alone, dense and by rows.

This needs no compiler. It tells what rows can save of a step: `dense_ms` is the time of the weight
gradients of all layers that take rows, as matrix products, `rows_ms` is that of the same gradients
by rows, with norms, draw and gather.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.positions.rows import RowConv2d, RowLinear, row_grad_weight, swap_rows
from benchmarks.timing import alternate
from benchmarks.workload import Workload

__all__ = ["FORMATS_OF_PRODUCTS", "ProductRow", "measure_products", "product_shapes"]

FORMATS_OF_PRODUCTS = {
    "model": "",
    "layers": "d",
    "drop_rate": ".2f",
    "dense_ms": ".1f",
    "rows_ms": ".1f",
    "saved": ".2f",
}


@dataclass(frozen=True, kw_only=True)
class ProductRow:
    """The weight gradients of a model at one drop rate; sums over layers of medians.

    Attributes:
        model: name, resolution, batch, precision, layout.
        layers: layers that take rows.
        drop_rate: share of the rows left out.
        dense_ms, rows_ms: milliseconds, see above.
        saved: share of `dense_ms` that rows save.
    """

    model: str
    layers: int
    drop_rate: float
    dense_ms: float
    rows_ms: float
    saved: float


def product_shapes(model: nn.Module, images: Tensor) -> Counter[tuple[int, int, int]]:
    """Return how many layers have each number of rows, output and input channels."""
    shapes: Counter[tuple[int, int, int]] = Counter()

    def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        c, c_in = module.weight.shape[:2]
        shapes[output.numel() // c, c, c_in] += 1

    swapped = swap_rows(copy.deepcopy(model), 1.0)
    for module in swapped.modules():
        if isinstance(module, (RowLinear, RowConv2d)):
            module.register_forward_hook(note)
    with torch.no_grad():
        swapped(images)
    return shapes


def measure_products(
    workload: Workload, drop_rates: list[float], rounds: int, clock: Callable[[], float]
) -> list[ProductRow]:
    """Measure the weight gradients of a workload's model.

    Args:
        workload: the model and its input.
        drop_rates: shares of rows to leave out.
        rounds: timed runs of each product.
        clock: returns seconds.

    Returns:
        A row for each drop rate.
    """
    shapes = product_shapes(*workload.build())
    dense, by_rate = 0.0, dict.fromkeys(drop_rates, 0.0)
    for (rows, c, c_in), count in shapes.items():
        grad, x = torch.randn(rows, c), torch.randn(rows, c_in)
        steps: dict[str, Callable[[], Tensor]] = {
            str(rate): partial(row_grad_weight, grad, x, torch.tensor(1 - rate))
            for rate in drop_rates
        }
        steps["dense"] = partial(torch.mm, grad.t(), x)
        timings = alternate(steps, rounds, clock=clock)
        dense += count * timings["dense"].median
        for rate in drop_rates:
            by_rate[rate] += count * timings[str(rate)].median
    return [
        ProductRow(
            model=workload.title,
            layers=shapes.total(),
            drop_rate=rate,
            dense_ms=dense,
            rows_ms=ms,
            saved=1 - ms / dense if dense else 0.0,
        )
        for rate, ms in by_rate.items()
    ]
