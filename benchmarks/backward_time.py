"""T_backward: the part of a dense step's time that sparse back-propagation can reduce.

It is the time inside

- `aten::convolution_backward`, for all convolutions;
- the two backward products of each linear layer that takes part.

Convolutions have their own operator. The products are `aten::mm` or `aten::addmm`, like any other
matrix product, and on a CPU they run in the forward's thread. Two things in the profile identify
them: they run below an autograd node, and their operands have the sizes of a layer's call,
y [T, C] = x [T, C_in] w^T:

    dx = mm(dy, w)        [T, C] x [C, C_in]
    dw = mm(t(dy), x)     [C, T] x [T, C_in], or its transpose

Neither is enough alone. When one layer widens and the next narrows, a forward product of one has
the sizes of a backward product of the other; and attention has backward products too. If more
products of some sizes ran than the layers have, the layers get their share of the time. Operations
that Inductor fused into a product (the sum of two gradients, as `addmm`) count with it. `missing`
counts the products that are not in the profile because Inductor replaced them by other code.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import synchronize

__all__ = ["BackwardTime", "ProfiledStep", "attribute", "linear_products"]

# Sizes of a matrix product, [m, k] x [k, n]: k, then the smaller and the larger of m and n, because
# a product and its transpose are the same work.
Product = tuple[int, int, int]

# Operator -> position of the left operand among its inputs.
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1}
_CONV_BACKWARD = "aten::convolution_backward"
# `torch::RecordScope::BACKWARD_FUNCTION`: the event is an autograd node.
_BACKWARD_SCOPE = 1


@dataclass(frozen=True)
class BackwardTime:
    """Time of one dense step.

    Attributes:
        conv_ms: milliseconds inside backward convolutions.
        linear_ms: milliseconds inside the backward products of linear layers.
        missing: number of products of linear layers that the profile does not show.
    """

    conv_ms: float
    linear_ms: float = 0.0
    missing: int = 0

    @property
    def total_ms(self) -> float:
        """Their sum."""
        return self.conv_ms + self.linear_ms

    def __str__(self) -> str:
        text = (
            f"sparsity can reduce {self.total_ms:.1f} ms of the dense step: {self.conv_ms:.1f} in"
            f" backward convolutions, {self.linear_ms:.1f} in linear layers' backward products"
        )
        if self.missing:
            text += f"; {self.missing} such products are not in the profile, so this is too low"
        return text


class _LinearCalls(TorchFunctionMode):
    """Records the backward products of the calls that use one of the given weights."""

    def __init__(self, weights: Collection[int]) -> None:
        super().__init__()
        self.weights = weights
        self.products: Counter[Product] = Counter()

    def __torch_function__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is functional.linear:
            given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
            input, weight = given["input"], given["weight"]
            if id(weight) in self.weights:
                channels, inputs = weight.shape
                rows = input.numel() // inputs
                if input.requires_grad:
                    self.products[_product(rows, channels, inputs)] += 1
                if weight.requires_grad:
                    self.products[_product(channels, rows, inputs)] += 1
        return func(*args, **kwargs)


def linear_products(
    model: nn.Module, names: Collection[str], forward: Callable[[], object]
) -> Counter[Product]:
    """Return the backward products of linear layers in one step.

    Args:
        model: the model.
        names: the layers to look at; layers that are not linear are skipped.
        forward: runs the model's forward, not compiled, with gradients enabled.

    Returns:
        Sizes -> number of products.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> linear_products(net, ["0", "1"], lambda: net(torch.randn(3, 8)))
        Counter({(3, 4, 8): 1, (2, 3, 4): 1, (3, 2, 4): 1})
    """
    weights = [model.get_submodule(name).weight for name in names]
    calls = _LinearCalls({id(weight) for weight in weights if weight.ndim == 2})
    with calls:
        forward()
    return calls.products


class ProfiledStep:
    """A dense step under the profiler, which takes turns with the timed steps.

    A profiled step cannot be compared with a step timed minutes ago, because the machine's speed
    drifts. Steps that find another state of memory, as after a step of the same variant, do not
    compare either. So this measures shares of the profiled step, once per round.

    Args:
        step: runs the step, already compiled.
        products: products of the linear layers that take part, from `linear_products`.
        device: device of the step; on a GPU the time of the kernels counts.
    """

    def __init__(self, step: Callable[[], object], products: Counter[Product], device: str) -> None:
        self.step = step
        self.products = products
        self.is_cuda = torch.device(device).type == "cuda"
        self.shares: list[BackwardTime] = []

    def __call__(self) -> None:
        """Run the step."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.is_cuda
        field = "device_time_total" if self.is_cuda else "cpu_time_total"
        with profile(activities=activities, record_shapes=True) as profiler:
            start = time.perf_counter()
            self.step()
            synchronize()
            profiled_ms = (time.perf_counter() - start) * 1e3
        found = attribute(profiler.events(), self.products, field)
        share = BackwardTime(
            found.conv_ms / profiled_ms, found.linear_ms / profiled_ms, found.missing
        )
        self.shares.append(share)

    def of(self, step_ms: float) -> BackwardTime:
        """Return the median shares in milliseconds of a step that takes `step_ms` unprofiled."""
        return BackwardTime(
            statistics.median(share.conv_ms for share in self.shares) * step_ms,
            statistics.median(share.linear_ms for share in self.shares) * step_ms,
            max(share.missing for share in self.shares),
        )


def attribute(
    events: Iterable[Any], products: Counter[Product], field: str = "cpu_time_total"
) -> BackwardTime:
    """Add up the events of a step.

    Args:
        events: the profiler's events of one dense step, with input shapes.
        products: products of the linear layers that take part.
        field: attribute of an event that holds its time in microseconds.

    Returns:
        Time of the step.
    """
    conv_us = 0.0
    times: defaultdict[Product, list[float]] = defaultdict(list)
    for event in events:
        if event.name == _CONV_BACKWARD:
            conv_us += getattr(event, field)
        elif event.name in _PRODUCTS and _is_in_backward(event):
            left, right = event.input_shapes[_PRODUCTS[event.name] :][:2]
            times[_product(left[0], left[1], right[1])].append(getattr(event, field))
    linear_us, missing = 0.0, 0
    for product, count in products.items():
        found = times[product]
        linear_us += sum(found) * min(1.0, count / max(len(found), 1))
        missing += max(count - len(found), 0)
    return BackwardTime(conv_us / 1e3, linear_us / 1e3, missing)


def _is_in_backward(event: Any) -> bool:
    while event is not None:
        if event.scope == _BACKWARD_SCOPE:
            return True
        event = event.cpu_parent
    return False


def _product(m: int, k: int, n: int) -> Product:
    return k, min(m, n), max(m, n)
