"""Scores averaged over steps, against a step-by-step eager reference in float64."""

import copy
import io

import pytest
import torch
from memory_reference import loss, memories, reference, train
from oracle import inclusion_probabilities, relative_error
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile
from ssprop_fx.runtime.module import SsPropModule

DECAY = 0.8
DROP_RATE = 0.75
# options of SparsityConfig, those of the reference, what is remembered
CASES: dict[str, tuple[dict, dict, tuple[str, ...]]] = {
    "alone": ({}, {}, ("scores",)),
    "memory": ({"memory": 0.9}, {"eta": 0.9}, ("left_out", "scores")),
}


class Net(nn.Module):
    """A layer that is called twice, one of each kind, a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.twice = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 16, 2, groups=2)
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        x = self.twice(self.twice(x).tanh()).tanh()
        x = self.up(self.depthwise(x).tanh()).tanh()
        torch._dynamo.graph_break()
        return self.head(x.flatten(2).transpose(1, 2))


def net() -> Net:
    return Net().double()


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 2)).double()


def compile_model(model: nn.Module, backend: str = "aot_eager", **options: object) -> SsPropModule:
    options = {"score_decay": DECAY, "channel_multiple": 1, "min_channels": 1, **options}
    scheduler = SparsityScheduler(constant(DROP_RATE))
    return ssprop_compile(
        model, scheduler, config=SparsityConfig(**options), backend=backend, dynamic=False
    )


def make_reference(model: nn.Module, **options: object) -> nn.Module:
    return reference(model, **{"eta": 0.0, "drop_rate": DROP_RATE, "decay": DECAY, **options})


def make_batches(steps: int, resolution: int = 4) -> list[Tensor]:
    shape = steps, 4, 3, resolution, resolution
    return [x.requires_grad_() for x in torch.randn(shape, dtype=torch.float64)]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {f"{i}": parameter.detach() for i, parameter in enumerate(model.parameters())}


def remembered(compiled: SsPropModule) -> dict[str, Tensor]:
    return compiled.ssprop.memory.state_dict()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_equal_the_reference(case: str, backend: str) -> None:
    options, as_reference, fields = CASES[case]
    model, batches = net(), make_batches(30)
    expected = make_reference(model, **as_reference)
    without = make_reference(model, **as_reference, decay=0.0)
    compiled = compile_model(model, backend, **options)
    for one in (compiled, expected, without):
        train(one, batches)
    assert {site.reason for site in report(compiled).sites} == {""}
    assert relative_error(parameters(compiled), parameters(expected)) < 1e-10
    assert relative_error(remembered(compiled), memories(expected, fields)) < 1e-10
    assert {"head:scores", "twice:scores", "twice:scores@1"} <= set(remembered(compiled))
    assert relative_error(parameters(compiled), parameters(without)) > 1e-3, "it does something"


@pytest.mark.parametrize(
    ("options", "as_reference"),
    [
        pytest.param({"block": 2}, {"block": 2}, marks=pytest.mark.slow),
        ({"gradients": "weight", "telemetry": True}, {"gradients": "weight"}),
        pytest.param(
            {"gradients": "input", "specialize": False},
            {"gradients": "input"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_whatever_else_is_set(options: dict, as_reference: dict) -> None:
    model, batches = net(), make_batches(4)
    expected, compiled = make_reference(model, **as_reference), compile_model(model, **options)
    for one in (compiled, expected):
        train(one, batches)
    assert relative_error(parameters(compiled), parameters(expected)) < 1e-10
    assert relative_error(remembered(compiled), memories(expected, ("scores",))) < 1e-10


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_forwards_precede_two_backwards_whose_gradients_accumulate(backend: str) -> None:
    model, batches = net(), make_batches(4)
    options, as_reference, fields = CASES["memory"]
    expected = make_reference(model, **as_reference)
    compiled = compile_model(model, backend, **options)
    for one in (compiled, expected):
        for first, second in (batches[:2], batches[2:]):
            # The reference numbers the calls of a layer by forward.
            losses = [loss(one(first)), loss(one(second))]
            losses[1].backward()
            losses[0].backward()
    gradients = [
        {f"{i}": p.grad for i, p in enumerate(m.parameters())} for m in (compiled, expected)
    ]
    assert relative_error(*gradients) < 1e-10
    assert relative_error(remembered(compiled), memories(expected, fields)) < 1e-10


def test_a_checkpoint_in_the_middle_goes_on_bit_for_bit() -> None:
    batches = make_batches(6)
    compiled = compile_model(small_net(), memory=0.9)
    train(compiled, batches[:3])
    file = io.BytesIO()
    torch.save((compiled.state_dict(), remembered(compiled)), file)
    train(compiled, batches[3:])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = compile_model(small_net(), memory=0.9)
    resumed.load_state_dict(weights)
    resumed.ssprop.memory.load_state_dict(state)
    train(resumed, batches[3:])
    assert all(map(torch.equal, resumed.parameters(), compiled.parameters()))
    assert all(torch.equal(remembered(resumed)[n], t) for n, t in remembered(compiled).items())

    without = compile_model(small_net(), score_decay=0.0, memory=0.9)
    with pytest.raises(ValueError, match=r"and SparsityConfig: .* none for '0:scores', '2:scores'"):
        without.ssprop.memory.load_state_dict(state)


def test_another_resolution_goes_on_with_the_same_average() -> None:
    model = small_net()
    batches = [*make_batches(2), *make_batches(2, resolution=6)]
    expected, compiled = make_reference(model), compile_model(model)
    for one in (compiled, expected):
        train(one, batches)
    assert relative_error(remembered(compiled), memories(expected, ("scores",))) < 1e-10


def test_sampled_weights_are_those_of_the_average() -> None:
    layer = nn.Linear(6, 16).double()
    compiled = compile_model(layer, select="sampled")
    average = torch.zeros(16).double()
    for x in torch.randn(5, 8, 6, dtype=torch.float64):
        output = layer(x)
        (grad,) = torch.autograd.grad(loss(output), output)
        average = DECAY * average + (1 - DECAY) * grad.norm(dim=0)
        layer.zero_grad()
        loss(compiled(x)).backward()
        kept = layer.bias.grad.nonzero().flatten()
        weights = layer.bias.grad[kept] / grad.sum(0)[kept]
        torch.testing.assert_close(weights, 1 / inclusion_probabilities(average, 4)[kept])
    assert relative_error(remembered(compiled), {":scores": average}) < 1e-10


def test_an_overflow_is_chosen_and_not_remembered() -> None:
    layer = nn.Linear(6, 16)
    compiled = compile_model(layer)
    x = torch.randn(4, 6)
    loss(compiled(x)).backward()
    held = {name: tensor.clone() for name, tensor in remembered(compiled).items()}
    factors = torch.ones(16)
    factors[3] = float("inf")
    layer.zero_grad()
    (compiled(x) * factors).sum().backward()
    assert not layer.weight.grad[3].isfinite().any(), "a GradScaler sees it"
    (now,), (before,) = remembered(compiled).values(), held.values()
    assert now[3] == before[3]
    assert (now != before).sum() == 15


def test_dense_steps_leave_it_and_low_precision_is_averaged_in_float32() -> None:
    scheduler = SparsityScheduler(lambda step: (0.5, 0.0)[step % 2])
    config = SparsityConfig(channel_multiple=1, min_channels=1, score_decay=DECAY)
    layer = nn.Sequential(nn.Linear(6, 16))
    compiled = ssprop_compile(layer, scheduler, config=config, backend="aot_eager")
    found = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            output = compiled(torch.randn(4, 6))
        loss(output.float()).backward()
        found.append(copy.deepcopy(remembered(compiled)))
        scheduler.step()
    assert {tensor.dtype for tensor in found[0].values()} == {torch.float32}
    assert torch.equal(found[0]["0:scores"], found[1]["0:scores"])


def test_telemetry_tells_of_the_present_scores() -> None:
    layer = nn.Linear(6, 16).double()
    compiled = compile_model(layer, telemetry=True)
    for x in torch.randn(3, 8, 6, dtype=torch.float64):
        layer.zero_grad()
        loss(compiled(x)).backward()
    output = layer(x)
    (grad,) = torch.autograd.grad(loss(output), output)
    scores, kept = grad.norm(dim=0), layer.bias.grad.nonzero().flatten()
    mass = float(scores[kept].sum() / scores.sum())
    assert compiled.ssprop.telemetry()[""].kept_mass == pytest.approx(mass, rel=1e-4)


def test_without_decay_nothing_is_remembered() -> None:
    assert SparsityConfig(score_decay=0).selection == SparsityConfig().selection
    compiled = compile_model(nn.Linear(6, 16), score_decay=0.0)
    loss(compiled(torch.randn(4, 6))).backward()
    assert remembered(compiled) == {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"score_decay": "0.9"}, TypeError, "score_decay must be a number, got '0.9'"),
        ({"score_decay": 1}, ValueError, r"score_decay must be in \[0, 1\), got 1"),
        ({"select": "random"}, ValueError, 'score_decay must be 0 with select="random"'),
        ({"axis": "sample"}, ValueError, 'score_decay must be 0 with axis="sample"'),
        ({"score": ("mean_abs", "l2")}, ValueError, "score must be a single one where"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        SparsityConfig(**{"score_decay": DECAY, **options})
