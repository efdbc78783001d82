"""ssprop_compile from the outside: what compiles, what runs, what the gradients are."""

import copy
import dataclasses

import pytest
import torch
from graphs import small_net
from oracle import gradients, keep_count, oracle_gradients, relative_error
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, cosine, report, ssprop_compile

EXACT = SparsityConfig(channel_multiple=1, min_channels=1)


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.mean()


def everywhere(module: nn.Module, name: str) -> bool:
    return True


def kept_rows(weight: Tensor) -> int:
    return int((weight.grad.flatten(1).abs().sum(1) > 0).sum())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_sparse_compile_serves_forty_drop_rates(backend: str) -> None:
    model = small_net(64)
    schedule = cosine(0.0, 0.95, steps=40)
    scheduler = SparsityScheduler(schedule)
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend=backend)
    x = torch.randn(2, 3, 12, 12)
    torch._dynamo.utils.counters.clear()
    rates = set()
    for step in range(41):
        model.zero_grad()
        loss(compiled(x)).backward()
        expected = keep_count(64, schedule(step))
        assert scheduler.keep_counts.tolist() == [expected, expected]
        assert kept_rows(model[0].weight) == expected
        assert kept_rows(model[3].weight) == expected
        rates.add(scheduler.drop_rate)
        scheduler.step()
    assert len(rates) == 41
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert [graph.runs for graph in compiled.ssprop.graphs] == [40]


@pytest.mark.parametrize(
    ("backend", "drop_rate"),
    [
        ("aot_eager", 0.5),
        ("aot_eager", 0.9),
        # test_plugin.py has a quick test under Inductor.
        *[pytest.param("inductor", rate, marks=pytest.mark.slow) for rate in (0.5, 0.9)],
    ],
)
def test_gradients_equal_the_oracle(backend: str, drop_rate: float) -> None:
    model = small_net(16).double()
    x = torch.randn(3, 3, 10, 10, dtype=torch.float64)
    expected = oracle_gradients(model, x, drop_rate, everywhere, loss)
    scheduler = SparsityScheduler(constant(drop_rate))
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend=backend)
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_drop_rate_zero_equals_torch_compile_bit_for_bit(backend: str) -> None:
    model = small_net(16)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 3, 10, 10)
    compiled = ssprop_compile(
        model, SparsityScheduler(constant(0.0)), config=EXACT, backend=backend
    )
    output, expected = compiled(x), torch.compile(twin, backend=backend)(x)
    assert torch.equal(output, expected)
    loss(output).backward()
    loss(expected).backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
    assert compiled.ssprop.graphs == ()


class Branches(nn.Module):
    """Graph breaks, a layer called twice and a functional convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.stem(x)).relu()
        torch._dynamo.graph_break()
        x = self.twice(x) + nn.functional.conv2d(x, self.blocks[0].weight.tanh())
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        return self.blocks[1](x)


def test_layers_keep_their_slots_through_graph_breaks_and_repeated_calls() -> None:
    model = Branches().double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    # The functional call with a computed weight belongs to no layer, so it stays dense.
    expected = oracle_gradients(model, x, 0.6, everywhere, loss)
    scheduler = SparsityScheduler(constant(0.6))
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend="aot_eager")
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    names = sorted(site.name for site in report(compiled).sparse_sites)
    assert names == ["blocks.0", "blocks.1", "stem", "twice", "twice"]


class Thrice(nn.Module):
    """A layer called several times in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(self.conv(x).tanh()).tanh())


@pytest.mark.slow
@pytest.mark.parametrize("block", [1, 2])
def test_calls_in_one_graph_share_the_keep_count_they_read(block: int) -> None:
    model = Thrice().double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64).requires_grad_()
    found = []
    for backend in ("aot_eager", "inductor"):
        config = dataclasses.replace(EXACT, block=block)
        scheduler = SparsityScheduler(constant(0.5))
        compiled = ssprop_compile(copy.deepcopy(model), scheduler, config=config, backend=backend)
        loss(compiled(x)).backward()
        found.append(gradients(compiled, x))
        x.grad = None
        assert len(report(compiled).sparse_sites) == 3
    assert relative_error(*found) < 1e-10


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_computed_weights_take_part() -> None:
    model = nn.Sequential(StandardizedConv(3, 16, 3), nn.ReLU()).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.5, everywhere, loss)
    compiled = ssprop_compile(
        model, SparsityScheduler(constant(0.5)), config=EXACT, backend="aot_eager"
    )
    x.requires_grad_()
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10
    assert len(report(compiled).sparse_sites) == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_short_last_batch_stays_sparse_and_right(backend: str) -> None:
    model = small_net(16).double()
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend=backend)
    for batch in (4, 3, 4, 2, 5):
        model.zero_grad()
        x = torch.randn(batch, 3, 10, 10, dtype=torch.float64)
        expected = oracle_gradients(model, x, 0.5, everywhere, loss)
        x.requires_grad_()
        loss(compiled(x)).backward()
        assert relative_error(gradients(model, x), expected) < 1e-10
    assert sum(graph.runs for graph in compiled.ssprop.backend.graphs) == 5
    assert len(compiled.ssprop.backend.graphs) == 2, (
        "the second batch size compiles a dynamic graph"
    )


def test_gradients_accumulate_and_two_forwards_precede_two_backwards() -> None:
    model = small_net(16).double()
    x, y = torch.randn(2, 2, 3, 10, 10, dtype=torch.float64)
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend="aot_eager")
    expected = [oracle_gradients(model, data, 0.5, everywhere, loss) for data in (x, y)]
    first, second = loss(compiled(x)), loss(compiled(y))
    # The keep counts are the forward's, whatever the scheduler has done since.
    scheduler.schedule = constant(0.9)
    scheduler.step()
    first.backward()
    second.backward()
    total = {name: expected[0][name] + expected[1][name] for name, _ in model.named_parameters()}
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert relative_error(actual, total) < 1e-10


def test_frozen_layers_and_inputs_without_gradient() -> None:
    model = small_net(16).double()
    model[0].weight.requires_grad_(False)
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    expected = oracle_gradients(model, x, 0.5, everywhere, loss)
    expected.pop("inputs")
    compiled = ssprop_compile(
        model, SparsityScheduler(constant(0.5)), config=EXACT, backend="aot_eager"
    )
    loss(compiled(x)).backward()
    assert relative_error(gradients(model, x), expected) < 1e-10


def test_bfloat16_autocast_is_as_close_as_dense_bfloat16() -> None:
    """Against float64. When scores nearly tie, bfloat16 may select another channel."""
    torch.manual_seed(0)
    model = small_net(64)
    x = torch.randn(8, 3, 16, 16)
    exact = oracle_gradients(copy.deepcopy(model).double(), x.double(), 0.5, everywhere, loss)
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=EXACT, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        output = compiled(x)
    loss(output.float()).backward()
    kept = model[3].weight.grad.flatten(1).abs().sum(1) > 0
    same = kept == (exact["3.weight"].flatten(1).abs().sum(1) > 0)
    assert kept.sum() == 32
    assert same.float().mean() > 0.9
    actual, expected = model[3].weight.grad[same].double(), exact["3.weight"][same]
    assert (actual - expected).norm() / expected.norm() < 0.02
    assert model[3].weight.grad.dtype == torch.float32


def test_mode_and_options_reach_inductor(no_code: None) -> None:
    seen = []
    model = small_net(16)
    compiled = ssprop_compile(
        model,
        SparsityScheduler(constant(0.5)),
        config=EXACT,
        options={"joint_custom_pre_pass": seen.append},
    )
    loss(compiled(torch.randn(2, 3, 10, 10))).backward()
    assert len(seen) == 1, "a pass that the user put into the hook still runs"
    assert len(report(compiled).sparse_sites) == 2


def test_report_counts_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 64, 3), nn.Conv2d(64, 80, 3))
    config = SparsityConfig(
        channel_multiple=16, min_channels=8, filter_fn=lambda module, name: name != "2"
    )
    scheduler = SparsityScheduler(constant(0.7))
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    assert "no sparse graph" in str(report(compiled))
    loss(compiled(torch.randn(2, 3, 12, 12))).backward()
    made = report(compiled)
    by_name = {site.name: site for site in made.sites}
    assert by_name["0"].reason == "fewer than min_channels=8 output channels"
    assert by_name["2"].reason == "filtered out by filter_fn"
    sparse = by_name["1"]
    assert (sparse.kind, sparse.channels, sparse.kept, sparse.reason) == ("conv2d", 64, 16, "")
    assert sparse.flops == 2 * 2 * (2 * 64 * 8 * 8) * 4 * 9
    assert made.saved_flops == sparse.flops * 3 // 4
    # The first layer computes no input gradient.
    assert by_name["0"].flops == 2 * (2 * 4 * 10 * 10) * 3 * 9
    assert made.backward_flops == sum(site.flops for site in made.sites)
    assert "sparse" in str(made)
    assert "dense: filtered out by filter_fn" in str(made)


def test_two_models_with_equal_graphs_use_their_own_slots() -> None:
    scheduler = SparsityScheduler(constant(0.5))
    first, second = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
    models = [
        ssprop_compile(m, scheduler, config=EXACT, backend="inductor") for m in (first, second)
    ]
    x = torch.randn(2, 3, 8, 8)
    scheduler.keep_counts.copy_(torch.tensor([2, 7]))
    for model in models:
        loss(model(x)).backward()
    assert (kept_rows(first.weight), kept_rows(second.weight)) == (2, 7)
