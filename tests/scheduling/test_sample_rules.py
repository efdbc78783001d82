"""Rules for samples: the counts against brute force, and the draws against their bound."""

import io
import math
import warnings

import pytest
import torch
from oracle import relative_error
from ssprop_passes.errors import NoEffectWarning
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.samples import choose_samples
from ssprop_passes.selection.selectors import sampled
from torch import Tensor, nn
from torch.nn import functional

from ssprop_fx import (
    AddedError,
    AddedNoise,
    KeptMass,
    SparsityConfig,
    SparsityScheduler,
    bar,
    report,
    ssprop_compile,
)
from ssprop_fx.compiler import sample_choice
from ssprop_fx.scheduling.sample_rules import SampleRule, sample_count

DRAWS = 20_000
SAMPLES = SparsityConfig(axis="sample")
SCORES = (
    [1.0] * 13,
    [1.0, 1e-9, 1e-9, 0.0, 0.0],
    [5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.0],
    torch.rand(15, generator=torch.Generator().manual_seed(0)).pow(4).tolist(),
)


def added_noise(scores: Tensor, k: float) -> float:
    """Return sum s^2 (1 / p - 1) / sum s^2, where p = min(1, c s) adds up to k, by bisection."""
    scores = scores[scores > 0]
    low, high = 1e-9, 1e12
    for _ in range(200):
        c = math.sqrt(low * high)
        low, high = (c, high) if (c * scores).clamp(max=1).sum() < k else (low, c)
    p = (high * scores).clamp(max=1)
    return float((scores.square() * (1 / p - 1)).sum() / scores.square().sum())


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("target", [0.05, 0.3, 1.0, 5.0])
def test_added_noise_takes_the_fewest_samples_within_the_bound(
    scores: list[float], target: float
) -> None:
    s = torch.tensor(scores, dtype=torch.float64)
    count = sample_count(AddedNoise(target), s)
    assert added_noise(s, count) <= target + 1e-6
    assert count == 1 or added_noise(s, count - 1) > target - 1e-6


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("target", [0.3, 0.5, 0.9, 0.99])
def test_kept_mass_takes_the_fewest_samples_that_hold_it(
    scores: list[float], target: float
) -> None:
    count = sample_count(KeptMass(target), torch.tensor(scores))
    held = [sum(sorted(scores)[-k:]) / sum(scores) for k in range(1, len(scores) + 1)]
    assert held[count - 1] >= target - 1e-6
    assert count == 1 or held[count - 2] < target


@pytest.mark.parametrize("rule", [KeptMass(0.9), AddedNoise(0.3)])
def test_batches_without_information(rule: SampleRule) -> None:
    assert sample_count(rule, torch.zeros(8)) == 1
    for bad in (math.nan, math.inf):
        assert sample_count(rule, torch.tensor([1.0, bad, 1.0, 1.0])) == 4
    assert sample_count(rule, torch.tensor([2.0])) == 1


def test_counts_come_in_few_levels_and_within_the_budget() -> None:
    scores = torch.cat([torch.ones(33), torch.zeros(31)])
    assert sample_count(KeptMass(0.99), scores) == 36
    assert sample_count(KeptMass(0.99, budget=0.25), scores) == 16
    assert sample_count(AddedNoise(0.01, budget=0.25), scores) == 16
    assert sample_count(AddedNoise(1e-6), torch.ones(37)) == 37


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: AddedNoise(0), "target must be above 0 and finite, got 0"),
        (lambda: AddedNoise("0.3"), "target must be a number, got '0.3'"),  # type: ignore[arg-type]
        (lambda: AddedNoise(0.3, budget=0), r"budget must be in \(0, 1\] or None, got 0"),
        (
            lambda: compile_linear(SparsityScheduler(controller=AddedError(0.1)), SAMPLES),
            "controller must be KeptMass or AddedNoise",
        ),
        (
            lambda: compile_linear(SparsityScheduler(controller=AddedNoise(0.1)), None),
            "controller must be KeptMass or AddedError for channels",
        ),
        (
            lambda: compile_linear(None, SparsityConfig()),
            "scheduler must be a SparsityScheduler for channels",
        ),
        (lambda: SparsityScheduler(), "schedule must be a .*, unless there is a controller"),
        (lambda: SparsityScheduler(AddedNoise(1)), r"schedule .* write controller=AddedNoise\("),
        (
            lambda: ssprop_compile(nn.Linear(2, 2), KeptMass(0.5)),  # type: ignore[arg-type]
            r"scheduler must be .*: write SparsityScheduler\(controller=KeptMass\(",
        ),
        (lambda: AddedNoise(math.inf), "target must be above 0 and finite, got inf"),
        (
            lambda: compile_linear(
                SparsityScheduler(controller=AddedNoise(1)),
                SparsityConfig(axis="sample", select="random"),
            ),
            'select must be "sampled", or left out, with AddedNoise',
        ),
        (lambda: sample_count(KeptMass(0.9), -torch.ones(3)), "score must not be negative .*-1"),
    ],
)
def test_wrong_arguments_have_one_line(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def compile_linear(
    scheduler: SparsityScheduler | None, config: SparsityConfig | None
) -> "tuple[nn.Linear, nn.Module]":
    layer = nn.Linear(8, 3).double()
    return layer, ssprop_compile(layer, scheduler, config=config, backend="aot_eager")


def test_draws_add_the_noise_of_the_bound_and_no_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 20,000 draws of a compiled network, whose samples have orthogonal gradients."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 3).double()
    words, labels = torch.eye(8, dtype=torch.float64), torch.randint(3, (8,))
    logits = layer(words)
    logits.retain_grad()
    (8 * functional.cross_entropy(logits, labels)).backward()
    assert logits.grad is not None
    assert layer.weight.grad is not None
    scores, dense = logits.grad.norm(dim=1), layer.weight.grad.clone()
    # The bound that three samples just reach.
    bound = added_noise(scores, 3) * 1.001
    assert sample_count(AddedNoise(bound), scores) == 3
    scheduler = SparsityScheduler(controller=AddedNoise(bound))
    compiled = ssprop_compile(layer, scheduler, config=SAMPLES, backend="aot_eager")
    # A choice determines the gradient: take a step once for each that occurs.
    gradients: dict[tuple[int, ...], Tensor] = {}
    drawn = []
    for _ in range(DRAWS):
        indices, weights = choose_samples(Selection(select=sampled), scores, 3)
        key = tuple(indices.tolist())
        drawn.append(key)
        if key not in gradients:
            made = indices, weights
            monkeypatch.setattr(sample_choice, "choose_samples", lambda *_args, made=made: made)
            layer.weight.grad = None
            (8 * functional.cross_entropy(compiled(words), labels)).backward()
            gradients[key] = layer.weight.grad
    assert len(gradients) > 5
    found = torch.stack([gradients[key] for key in drawn])
    error = found.std(0) / DRAWS**0.5
    assert ((found.mean(0) - dense).abs() <= 4 * error + 1e-12).all()
    variance = float((found - dense).square().sum((1, 2)).mean() / scores.square().sum())
    assert variance == pytest.approx(bound, rel=0.1)


@pytest.mark.parametrize("rule", [KeptMass(0.8), AddedNoise(0.5)])
def test_the_count_follows_within_the_step(rule: SampleRule) -> None:
    """No step before has seen the batch of which few samples matter."""
    torch.manual_seed(0)
    layer, compiled = compile_linear(SparsityScheduler(controller=rule), SAMPLES)
    x = torch.randn(16, 8, dtype=torch.float64)
    (compiled(x)).sum().backward()
    many = compiled.ssprop.samples
    factors = torch.full((16, 1), 1e-6, dtype=torch.float64)
    factors[[3, 11]] = 1
    layer.weight.grad = None
    (compiled(x) * factors).sum().backward()
    few = compiled.ssprop.samples
    assert many.kept > few.kept == 2
    assert few.kept_mass > 0.99
    assert few.size == 16
    expected = torch.stack([x[[3, 11]].sum(0)] * 3)
    assert relative_error({"w": layer.weight.grad}, {"w": expected}) < 1e-2
    assert report(compiled).kept_samples == (2, 16)


def test_a_selector_that_repeats_samples_is_refused() -> None:
    config = SparsityConfig(axis="sample", select=lambda scores, k: torch.zeros(k).long())
    _, compiled = compile_linear(SparsityScheduler(controller=KeptMass(0.5)), config)
    with pytest.raises(ValueError, match="select must return indices that are all different"):
        compiled(torch.randn(8, 8, dtype=torch.float64)).square().sum().backward()


def test_a_model_that_has_trained_can_be_saved_whole() -> None:
    _, compiled = compile_linear(None, None)
    compiled(torch.randn(8, 8, dtype=torch.float64)).square().sum().backward()
    saved = io.BytesIO()
    torch.save(compiled, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert loaded.ssprop.scheduler.controller == AddedNoise(0.1)


def test_what_was_kept_is_of_the_last_backward() -> None:
    _, compiled = compile_linear(None, None)
    compiled(torch.randn(8, 8, dtype=torch.float64)).square().sum().backward()
    assert compiled.ssprop.samples.size == 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        compiled(torch.randn(1, 8, dtype=torch.float64)).square().sum().backward()
    assert compiled.ssprop.samples is None


def test_draws_repeat_under_a_seed() -> None:
    layer, compiled = compile_linear(SparsityScheduler(controller=AddedNoise(1.0)), SAMPLES)
    x = torch.randn(16, 8, dtype=torch.float64)
    gradients = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        layer.weight.grad = None
        compiled(x).square().sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(gradients[0], gradients[2])
    assert not torch.equal(gradients[0], gradients[1])


def test_a_schedule_says_which_steps_are_sparse() -> None:
    layer, compiled = compile_linear(
        SparsityScheduler(bar(0.5, period=2), controller=KeptMass(0.5)), SAMPLES
    )
    x = torch.randn(16, 8, dtype=torch.float64)
    rows = []
    for _ in range(2):
        layer.weight.grad = None
        compiled(x).square().sum().backward()
        rows.append(layer.weight.grad)
        compiled.ssprop.scheduler.step()
    dense = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    assert torch.equal(rows[0], dense)
    assert relative_error({"w": rows[1]}, {"w": dense}) > 0.05


def test_kept_mass_may_draw_its_samples() -> None:
    config = SparsityConfig(axis="sample", select="sampled")
    _, compiled = compile_linear(SparsityScheduler(controller=KeptMass(0.5)), config)
    compiled(torch.randn(16, 8, dtype=torch.float64)).square().sum().backward()
    told = compiled.ssprop.samples
    assert told.kept < 16
    assert told.error > 0
    assert compiled.ssprop.scheduler.controller.select is None
    assert AddedNoise(1).select is sampled
