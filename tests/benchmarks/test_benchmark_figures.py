"""The benchmarks' figures: formulas, attribution of time, memory, timing."""

import itertools
import math
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import machine
from benchmarks.backward_time import BackwardTime, ProfiledStep, attribute, linear_products
from benchmarks.layer_parts import PARTS, Setting, make_parts
from benchmarks.layers import TYPICAL, Layer
from benchmarks.memory import peak_mib
from benchmarks.step_row import StepRow, bound, efficiency
from benchmarks.timing import Timing, alternate
from benchmarks.workload import Workload


def test_bound_and_efficiency() -> None:
    assert bound(100, 60, 0.5) == 100 / 70
    assert bound(100, 60, 0) == 1
    # At the bound, half way to it, beyond it, and slower than dense.
    times = (70, 85, 55, 115)
    assert [efficiency(100, ms, 60, 0.5) for ms in times] == [1, 0.5, 1.5, -0.5]
    assert math.isnan(efficiency(100, 100, 60, 0))
    workload = Workload(model="m", batch_size=2, img_size=8)
    backward = BackwardTime(conv_ms=40, linear_ms=20)
    timings = [Timing.of([ms]) for ms in (85, 100, 80)]
    row = StepRow.of(
        workload, "ssprop", 0.5, timings[0], timings[1], backward, 0.4, 1.0, timings[2]
    )
    assert (row.speedup, row.bound, row.efficiency) == (100 / 85, 100 / 70, 0.5)
    assert (row.over_plain, row.over_low, row.over_high) == (85 / 80,) * 3
    # When the machine's speed drifts, the ratios of the rounds count, as for the speed-up.
    drifting = [Timing.of(times) for times in ([50, 110, 40, 90], [100, 200, 80, 60])]
    row = StepRow.of(workload, "ssprop", 0.5, *drifting, backward, 0.4, 1.0)
    assert row.speedup == (2 + 200 / 110) / 2
    assert row.efficiency == efficiency(90, 90 / row.speedup, 60, 0.5) > 1.4
    row = StepRow.of(workload, "dense", 0.0, timings[1], timings[1], backward, 0.0, 1.0)
    assert row.speedup_low == row.speedup == row.speedup_high == 1
    assert math.isnan(row.over_plain)
    assert (row.backward_ms, row.linear_backward_ms) == (60, 20)


def event(name: str, us: float, *shapes: list[int], scope: int = 1) -> SimpleNamespace:
    node = SimpleNamespace(name="node", scope=scope, cpu_parent=None)
    return SimpleNamespace(
        name=name, scope=0, cpu_parent=node, cpu_time_total=us, input_shapes=list(shapes)
    )


# Backward products of y [5, 2] = x [5, 3] w^T.
DX, DW = ([5, 2], [2, 3]), ([2, 5], [5, 3])
PRODUCTS = Counter({(2, 3, 5): 1, (5, 2, 3): 1})


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([("aten::mm", 10, *DX), ("aten::mm", 30, *DW)], (0, 0.040, 0)),
        # The weight's gradient transposed, and a sum fused into the input's gradient.
        ([("aten::addmm", 10, [3], *DX), ("aten::mm", 30, [3, 5], [5, 2])], (0, 0.040, 0)),
        # A product of other sizes and a batched product do not count.
        ([("aten::mm", 10, *DX), ("aten::mm", 5, [4, 4], [4, 4])], (0, 0.010, 1)),
        ([("aten::bmm", 10, [1, 5, 2], [1, 2, 3])], (0, 0, 2)),
        # Two products have the same sizes, and one of them is the layer's.
        ([("aten::mm", 10, *DX), ("aten::mm", 20, *DX), ("aten::mm", 1, *DW)], (0, 0.016, 0)),
        # Convolutions count whatever their sizes.
        ([("aten::convolution_backward", 7, [1])] * 3, (0.021, 0, 2)),
    ],
)
def test_attribution(events: list[tuple], expected: tuple[float, float, int]) -> None:
    time = attribute([event(*e) for e in events], PRODUCTS)
    assert (time.conv_ms, time.linear_ms, time.missing) == pytest.approx(expected)


def test_forward_products_do_not_count() -> None:
    time = attribute([event("aten::mm", 10, *DX, scope=0)], PRODUCTS)
    assert (time.linear_ms, time.missing) == (0, 2)


class Mixer(nn.Module):
    """Linear layers whose forward products have the sizes of each other's backward products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.wide = nn.Linear(8, 16, bias=False)
        self.narrow = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = x + self.narrow(torch.tanh(self.wide(x)))
        # Attention: products of activations, in the backward as well.
        x = torch.softmax(x @ x.transpose(1, 2), -1) @ x
        return self.head(x.mean(1))


@pytest.mark.parametrize("names", [("wide", "narrow"), ("conv", "wide", "head"), ("conv",)])
def test_the_backward_products_of_layers_are_found(names: tuple[str, ...]) -> None:
    model, x = Mixer(), torch.randn(3, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager")

    def step(module: nn.Module = compiled) -> None:
        module(x).square().sum().backward()

    products = linear_products(model, names, lambda: step(model))
    count = 2 * len(set(names) - {"conv"})
    assert products.total() == count
    step()
    with profile(record_shapes=True) as profiler:
        step()
    # Every event counts as one microsecond, so the time is the number of products.
    time = attribute(profiler.events(), products, field="count")
    assert (time.conv_ms * 1e3, time.linear_ms * 1e3, time.missing) == pytest.approx((1, count, 0))
    profiled = ProfiledStep(step, products, "cpu")
    profiled()
    profiled()
    time = profiled.of(step_ms=50.0)
    assert time.conv_ms > 0
    assert (time.linear_ms > 0) == (count > 0)
    # The times are shares of the step.
    assert time.total_ms < 50
    assert "not in the profile" not in str(time)


def test_missing_products_are_told() -> None:
    assert "1 such products are not in the profile" in str(BackwardTime(2.0, 1.0, missing=1))


def test_peak_memory_counts_what_is_held_at_once() -> None:
    layer = nn.Linear(2**9, 2**9, bias=False)  # 1 MiB
    x = torch.randn(2**9, 2**9, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    step()
    layer.weight.grad = x.grad = None
    # The output, its gradient if a kernel needs it in memory, and the two gradients.
    assert 3 <= peak_mib(step, "cpu") <= 4.1


def test_a_percent_is_seen_where_the_machine_drifts() -> None:
    generator = random.Random(1)
    machine = [100 * generator.choice([1, 1, 1.5, 3]) for _ in range(200)]
    once, again, slower = (
        Timing.of([ms * factor * generator.gauss(1, 0.01) for ms in machine])
        for factor in (1, 1, 1.01)
    )
    ratio = slower.over(once)
    assert 1 < ratio.low < ratio.median < ratio.high < 1.02
    same = again.over(once)
    assert 0.995 < same.low < 1 < same.high < 1.005
    assert slower.over(once) == ratio, "the bootstrap has a seed"


def test_variants_take_turns() -> None:
    order: list[str] = []
    variants = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = alternate(
        variants, rounds=2, warmup=1, prepare={"b": lambda: order.append("prepare b")}
    )
    forwards, backwards = ["a", "prepare b", "b"], ["prepare b", "b", "a"]
    assert order == forwards + backwards + forwards
    assert timings.keys() == {"a", "b"}


@pytest.mark.parametrize("names", ["abcd", "abcdefgh", "abcde"])
def test_every_variant_follows_every_other(names: str) -> None:
    order: list[str] = []
    count = len(names)
    alternate({name: lambda name=name: order.append(name) for name in names}, count, warmup=0)
    rounds = [order[i : i + count] for i in range(0, len(order), count)]
    assert [set(place) for place in zip(*rounds, strict=True)] == [set(names)] * count
    pairs = [pair for one in rounds for pair in itertools.pairwise(one)]
    if count % 2 == 0:
        assert sorted(pairs) == list(itertools.permutations(names, 2))
    else:
        assert all(pairs.count(pair) <= 2 for pair in pairs)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    found = machine.environment("cpu")
    assert found["commit"] == "abc"
    assert found["torch"] == torch.__version__
    monkeypatch.setenv("LD_PRELOAD", "libother.so")
    machine.allocator.cache_clear()
    assert machine.environment("cpu")["allocator"].endswith("LD_PRELOAD=libother.so")
    machine.allocator.cache_clear()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Layer("", (8, 9, 9), 16, (3, 3), (1, 1), (1, 1), (1, 1)), "8-16 3x3 at 9x9"),
        (
            Layer("", (8, 9, 7), 16, (3, 1), (2, 2), (1, 0), (2, 2), groups=4),
            "8-16 3x1/2 dilation 2 groups 4 at 9x7",
        ),
        (Layer("", (5, 8), 16), "8-16 at 5"),
        (Layer("", (8,), 16), "8-16"),
    ],
)
def test_a_layers_shape_is_what_it_builds(layer: Layer, shape: str) -> None:
    assert layer.shape == shape
    module, input = Setting(batch_size=2).build(layer)
    output = module(input)
    assert output.shape[-1 if isinstance(module, nn.Linear) else 1] == layer.channels
    assert getattr(module, "groups", 1) == layer.groups


@pytest.mark.parametrize("layer", TYPICAL, ids=lambda layer: layer.name)
def test_the_reduced_operation_is_the_pass_s_own(layer: Layer) -> None:
    layer = replace(layer, input_shape=tuple(min(n, 320) for n in layer.input_shape))
    if layer.kernel:
        layer = replace(layer, input_shape=(layer.input_shape[0], 4, 4))
    module, input = Setting(batch_size=1).build(layer)
    grad_output = torch.randn_like(module(input))
    parts = make_parts(module, input, grad_output, 2, "eager")
    assert tuple(parts) == PARTS
    called: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        parts["reduced"]()
    assert called == (["ssprop.conv_backward.default"] if layer.kernel else ["aten.mm.default"] * 2)
