"""Samples as the axis: an oracle, unbiasedness, changing batches, refused options."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from oracle import (
    ORACLE_SCORES,
    find_factors,
    inclusion_probabilities,
    keep_count,
    relative_error,
)
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.replacements.linear import linear_backward_of_samples
from ssprop_passes.selection.policy import GRADIENTS, Selection
from ssprop_passes.selection.samples import Samples, choose_samples
from ssprop_passes.selection.scores import SCORES
from ssprop_passes.selection.selectors import SELECTORS
from torch import Tensor, nn

from ssprop_fx import (
    SparsityConfig,
    SparsityScheduler,
    constant,
    inspect_sites,
    join,
    report,
    ssprop_compile,
)

DRAWS = 20_000
BATCH = 6
SITES = ("stem", "grouped", "depthwise", "up", "mlp.0", "mlp.2", "window", "last")


class Net(nn.Module):
    """Every kind of layer, both normalisations, a path around the sites, rows of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.layer_norm = nn.LayerNorm(10)
        self.mlp = nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 10, bias=False))
        self.window = nn.Linear(10, 10)
        self.last = nn.Linear(10, 11)
        self.head = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.tanh(self.up(self.depthwise(torch.tanh(self.grouped(x)))))
        x = x.flatten(2).transpose(1, 2)
        x = x + self.mlp(self.layer_norm(x))
        # The leading dimension is four times the batch: the rows of a sample are consecutive.
        windows = torch.tanh(self.window(x.reshape(4 * x.shape[0], -1, 10)))
        x = torch.tanh(self.last(windows.reshape(x.shape)))
        return self.head(x.mean(1))


def loss(output: Tensor) -> Tensor:
    strength = torch.arange(1.0, output.shape[0] + 1, dtype=output.dtype)
    return (output.sin() * strength[:, None]).sum()


def config(**options: object) -> SparsityConfig:
    return SparsityConfig(
        **{"axis": "sample", "min_channels": 1, "filter_fn": lambda module, fqn: fqn != "head"}
        | options
    )


def make_input(batch: int = BATCH, layout: torch.memory_format = torch.channels_last) -> Tensor:
    x = torch.randn(batch, 3, 9, 9, dtype=torch.float64).to(memory_format=layout)
    return x.requires_grad_()


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all parameters, and of the input as "inputs"."""
    model.zero_grad()
    x.grad = None
    loss(model(x)).backward()
    assert x.grad is not None
    parameters = getattr(model, "_orig_mod", model).named_parameters()
    return {name: p.grad.clone() for name, p in parameters} | {"inputs": x.grad.clone()}


def oracle(
    model: nn.Module, x: Tensor, for_weight: Tensor, for_input: Tensor, sites: tuple[str, ...]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the gradients of a dense backward with factors, by sample, on each site's grad_output.

    A call's output is written as f(x, w0) + f(x0, w) - f(x0, w0) with constants x0 and w0. It then
    has two gradients: one reaches only the input, the other only the weight.

    Args:
        model: the model.
        x: the batch, [N, ...].
        for_weight, for_input: factors, [N].
        sites: names of the layers.

    Returns:
        The gradients; grad_output of the last site, without factors; the input of that site.
    """
    model = copy.deepcopy(model)
    layers = [model.get_submodule(name) for name in sites]
    seen: list[Tensor] = []

    def scaled(factors: Tensor) -> Callable[[Tensor], Tensor]:
        def scale(grad: Tensor) -> Tensor:
            rows = factors.repeat_interleave(grad.shape[0] // len(factors))
            return grad * rows.view(-1, *[1] * (grad.ndim - 1))

        return scale

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        (value,) = args
        by_input = constant[module](value)
        by_weight = module.forward(value.detach())
        by_input.register_hook(scaled(for_input))
        by_weight.register_hook(scaled(for_weight))
        result = by_input + by_weight - output.detach()
        if module is layers[-1]:
            seen.append(value.detach())
            result.register_hook(lambda grad: seen.append(grad.detach()))
        return result

    constant = {layer: copy.deepcopy(layer).requires_grad_(False) for layer in layers}
    for layer in layers:
        layer.register_forward_hook(hook)
    found = run(model, x.detach().clone().requires_grad_())
    return found, seen[1], seen[0]


def check(
    backend: str,
    select: str = "topk",
    score: str = "mean_abs",
    gradients: str = "both",
    layout: torch.memory_format = torch.channels_last,
) -> None:
    model, x = Net().double(), make_input(layout=layout)
    scheduler = SparsityScheduler(constant(0.5))
    options = {"select": select, "score": score, "gradients": gradients}
    compiled = ssprop_compile(model, scheduler, config=config(**options), backend=backend)
    # The model can be used again, because batch norm's statistics do not change the gradients.
    actual = run(compiled, x)
    made = report(compiled)
    assert {site.name for site in made.sparse_sites} == set(SITES)
    assert {(site.channels, site.kept) for site in made.sparse_sites} == {(BATCH, 3)}
    whole = sum(site.sparse_flops for site in made.sites)
    assert made.saved_flops == pytest.approx(whole / 2)

    ones = torch.ones(BATCH, dtype=torch.float64)
    dense, grad_output, value = oracle(model, x, ones, ones, SITES)
    scores = ORACLE_SCORES[score](grad_output.flatten(1), value.flatten(1))
    if select == "topk":
        kept = torch.zeros_like(ones)
        kept[scores.argsort(descending=True)[:3]] = 1
        weights = kept
    elif gradients == "input":
        # The sparse gradients show which samples a random selector kept.
        kept = actual["inputs"].flatten(1).any(1).double()
        weights = kept
    else:
        shares = [
            oracle(model, x, one, ones, SITES)[0]["last.weight"]
            for one in torch.eye(BATCH, dtype=torch.float64)
        ]
        weights = find_factors(shares, actual["last.weight"])
        kept = (weights.abs() > 1e-6).double()
        expected = 1 / inclusion_probabilities(scores, 3) if select == "sampled" else ones
        torch.testing.assert_close(weights, expected * kept)
        weights = expected * kept
    assert kept.sum() == 3
    for_weight = weights if gradients != "input" else ones
    for_input = kept if gradients != "weight" else ones
    expected, _, _ = oracle(model, x, for_weight, for_input, SITES)
    assert relative_error(actual, expected) < 1e-10
    assert relative_error(actual, dense) > 1e-2


def is_quick(select: str, score: str, gradients: str) -> bool:
    return (select, score, gradients) in {
        ("topk", "mean_abs", "both"),
        ("sampled", "l2_weight", "both"),
        ("random", "mean_abs", "input"),
    }


COMBINATIONS = [
    pytest.param(*case, marks=() if is_quick(*case) else pytest.mark.slow)
    for select in SELECTORS
    for score in SCORES
    for gradients in GRADIENTS
    if (case := (select, score, gradients))[::2] != ("sampled", "input")
]


@pytest.mark.parametrize(("select", "score", "gradients"), COMBINATIONS)
def test_gradients_equal_the_oracle(select: str, score: str, gradients: str) -> None:
    check("aot_eager", select, score, gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("select", "score", "layout"),
    [
        ("sampled", "l2_weight", torch.channels_last),
        ("topk", "mean_abs", torch.contiguous_format),
    ],
    ids=str,
)
def test_gradients_equal_the_oracle_under_inductor(
    select: str, score: str, layout: torch.memory_format
) -> None:
    check("inductor", select, score, layout=layout)


class Residual(nn.Module):
    """Layers that treat each sample separately."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)
        self.last = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = x + torch.tanh(self.second(self.norm(x)))
        return self.last(x)


def strong_batch(size: int) -> Tensor:
    """Return samples whose gradients differ in strength."""
    x = torch.randn(size, 5).double() * torch.logspace(-1.5, 0.5, size)[:, None]
    return x.requires_grad_()


@pytest.mark.parametrize("score", SCORES)
def test_expected_gradients_are_the_dense_ones(score: str) -> None:
    # This test combines draws of the selector with each sample's share of the weight gradients. The
    # oracle tests show that a sparse backward combines them this way.
    model, x, k = Residual().double(), strong_batch(12), 4
    ones, sites = torch.ones(12, dtype=torch.float64), ("first", "second", "last")
    dense, grad_output, value = oracle(model, x, ones, ones, sites)
    names = [f"{site}.{name}" for site in sites for name in ("weight", "bias")]
    shares = torch.stack(
        [
            torch.cat([oracle(model, x, one, one, sites)[0][name].flatten() for name in names])
            for one in torch.eye(12, dtype=torch.float64)
        ]
    )
    wanted = torch.cat([dense[name].flatten() for name in names])
    torch.testing.assert_close(shares.sum(0), wanted)

    def draw(select: str) -> Tensor:
        scores = ORACLE_SCORES[score](grad_output.flatten(1), value.flatten(1)).expand(DRAWS, -1)
        chosen = SELECTORS[select](scores, k)
        indices, weights = chosen if isinstance(chosen, tuple) else (chosen, torch.ones(DRAWS, k))
        factors = torch.zeros(DRAWS, 12).double().scatter(1, indices, weights.double())
        assert set(factors.count_nonzero(1).tolist()) == {k}
        return factors

    draws = draw("sampled") @ shares
    error = draws.std(0) / math.sqrt(DRAWS)
    assert (draws.mean(0) - wanted).abs().le(4 * error + 1e-12).all()
    uniform = draw("random") @ shares * 12 / k
    assert draws.var(0).sum() < 0.9 * uniform.var(0).sum()


@pytest.mark.slow
def test_expected_gradients_are_the_dense_ones_over_single_draws() -> None:
    model, x = Residual().double(), strong_batch(8)
    scheduler = SparsityScheduler(join([constant(0.0), constant(0.5)], [1]))
    options = {"select": "sampled", "score": "l2", "min_channels": 1}
    compiled = ssprop_compile(model, scheduler, config=config(**options), backend="aot_eager")
    names = [
        f"{site}.{name}" for site in ("first", "second", "last") for name in ("weight", "bias")
    ]

    def gradient() -> Tensor:
        found = run(compiled, x)
        return torch.cat([found[name].flatten() for name in names])

    dense = gradient()
    scheduler.step()
    draws = torch.stack([gradient() for _ in range(DRAWS)])
    error = draws.std(0) / math.sqrt(DRAWS)
    assert draws.std(0).max() > 0
    assert (draws.mean(0) - dense).abs().le(4 * error + 1e-12).all()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_kept_samples_are_exact_where_samples_are_not_coupled(backend: str) -> None:
    layers = [nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.Tanh()]
    model, x = nn.Sequential(*layers, nn.Linear(6, 3)).double(), strong_batch(10)
    dense = run(model, x)["inputs"]
    scheduler = SparsityScheduler(constant(0.7))
    compiled = ssprop_compile(model, scheduler, config=config(), backend=backend)
    sparse = run(compiled, x)["inputs"]
    kept = sparse.any(1)
    assert kept.sum() == 3
    torch.testing.assert_close(sparse[kept], dense[kept])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_site_from_all_samples_is_dense(rows: int) -> None:
    grad_output, value = torch.randn(4 * rows, 5).double(), torch.randn(4 * rows, 7).double()
    weight = torch.randn(5, 7).double()
    indices, weights = choose_samples(Selection(axis="sample"), grad_output, value, 4, rows)
    samples = Samples.of_rows(indices, weights, rows)
    found = linear_backward_of_samples(grad_output, value, weight, samples, (True,) * 3)
    expected = grad_output @ weight, grad_output.t() @ value, grad_output.sum(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_keep_counts_follow_the_batch_and_the_drop_rate(backend: str) -> None:
    model = Residual().double()
    scheduler = SparsityScheduler(join([constant(0.5), constant(0.8)], [1]))
    compiled = ssprop_compile(model, scheduler, config=config(), backend=backend)
    for batch in (8, 13, 22):
        for step, rate in enumerate((0.5, 0.8)):
            scheduler.load_state_dict({"last_step": step})
            x = strong_batch(batch)
            run(compiled, x)
            kept = keep_count(batch, rate)
            assert compiled.ssprop.keep_counts.tolist() == [kept] * 3
            # The residual connection carries all samples' gradients to the first site's output.
            assert int(x.grad.any(1).sum()) == kept
    # The second batch size compiles a graph of any size.
    assert len(compiled.ssprop.backend.graphs) == 2


def test_two_forwards_of_different_batches_before_their_backwards() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7)).double()
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=config(), backend="aot_eager")
    batches = [strong_batch(size) for size in (8, 4, 6)]
    for output in [loss(compiled(x)) for x in batches]:
        output.backward()
    assert [int(x.grad.any(1).sum()) for x in batches] == [4, 2, 3]


def test_keep_counts_are_rounded_where_a_multiple_is_asked_for() -> None:
    scheduler = SparsityScheduler(constant(0.8))
    compiled = ssprop_compile(
        Residual().double(), scheduler, config=config(channel_multiple=4), backend="aot_eager"
    )
    run(compiled, strong_batch(32))
    assert set(compiled.ssprop.keep_counts.tolist()) == {8}


def test_groups_of_a_convolution_do_not_divide_the_batch() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, groups=4), nn.Flatten(), nn.Linear(24, 3))
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=config(), backend="aot_eager")
    compiled(torch.randn(4, 4, 5)).sum().backward()
    assert [(site.channels, site.kept) for site in report(compiled).sites] == [(4, 2), (4, 2)]


class Layouts(nn.Module):
    """Layers whose leading dimension is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence_first = nn.Linear(5, 5)
        self.positions = nn.Linear(2, 5)
        self.single = nn.Linear(5, 5)
        self.product = nn.Linear(5, 5)
        self.batch_first = nn.Linear(5, 5)
        self.register_buffer("table", torch.randn(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.sequence_first(x.transpose(0, 1)).transpose(0, 1))
        x = x + self.positions(self.table).sum(0) + self.single(x[0, 0])
        x = torch.matmul(x, self.product.weight)
        return self.batch_first(torch.tanh(x))


@pytest.mark.filterwarnings("ignore:.*are in no sparse graph")
def test_what_is_not_of_samples_stays_dense_with_a_reason() -> None:
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(Layouts(), scheduler, config=config(), backend="aot_eager")
    # The length, 8, is a multiple of the batch, 4: the size alone does not identify the batch.
    compiled(torch.randn(4, 8, 5)).sin().sum().backward()
    reasons = {site.name: site.reason for site in report(compiled).sites}
    assert reasons == {
        "sequence_first": "the batch of 4 may be a later dimension of its input, not the leading"
        " one",
        "positions": "the leading dimension of its input, 7, is not a multiple of the batch of 4",
        "single": "it is called for a single sample",
        "product": "no convolution or linear call gives its output, so its samples are not known",
        "batch_first": "",
    }


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return self.second(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.only(x).tanh()


class Repeated(nn.Module):
    """Blocks that share one compiled graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.mark.parametrize("model", [Broken, Repeated])
def test_a_model_in_several_graphs_is_refused(model: type[nn.Module]) -> None:
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model(), scheduler, config=config(), backend="aot_eager")
    with pytest.raises(SsPropCompileError, match="needs the whole model in one graph"):
        compiled(torch.randn(4, 5)).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "batch"}, "axis must be one of"),
        ({"axis": "sample", "block": 2}, "block must be 1"),
        ({"axis": "sample", "specialize": True}, "specialize must be False or"),
        ({"axis": "sample", "ranks": "shared"}, 'ranks must be "own"'),
        ({"axis": "sample", "memory": 0.5}, "memory must be 0"),
        ({"axis": "sample", "telemetry": True}, "telemetry must be False"),
        ({"axis": "sample", "rates": {"stem": 0.5}}, "rates must be all 0"),
        ({"axis": "sample", "select": "sampled", "gradients": "input"}, "select must not be"),
    ],
    ids=str,
)
def test_refuses_what_does_not_go_with_it(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityConfig(**options)


def test_a_rate_of_zero_leaves_a_layer_dense() -> None:
    scheduler = SparsityScheduler(constant(0.5))
    made = config(rates={"second": 0})
    compiled = ssprop_compile(Residual().double(), scheduler, config=made, backend="aot_eager")
    run(compiled, strong_batch(8))
    assert {site.name: site.kept for site in report(compiled).sites} == {
        "last": 4,
        "second": 6,
        "first": 4,
    }


def test_the_no_edit_backend_keeps_samples() -> None:
    model, x = Residual().double(), strong_batch(8)
    options = {"schedule": "constant:rate=0.5", "axis": "sample", "min_channels": 1}
    compiled = torch.compile(model, backend="ssprop", options={**options, "backend": "aot_eager"})
    loss(compiled(x)).backward()
    assert {(site.channels, site.kept) for site in report(compiled).sites} == {(8, 4)}
    assert int(x.grad.any(1).sum()) == 4


def test_prediction_is_of_channels() -> None:
    with pytest.raises(ValueError, match='config must have axis="channel"'):
        inspect_sites(Residual(), torch.randn(4, 5), config=config())


@pytest.mark.slow
@pytest.mark.gate
@pytest.mark.filterwarnings("ignore:no site of the model was made sparse")
def test_the_gate_measures_samples() -> None:
    scheduler = SparsityScheduler(constant(0.75))
    compiled = ssprop_compile(nn.Conv2d(3, 40, 3), scheduler, config=SparsityConfig(axis="sample"))
    compiled(torch.randn(8, 3, 12, 12)).sum().backward()
    (site,) = compiled.ssprop.graphs[0].sites
    assert site.times is not None
    assert (site.times.kept, site.channels) == (2, 8)
    assert not site.reason or "with 2 samples" in site.reason
