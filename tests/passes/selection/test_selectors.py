"""Scores and selectors alone: unbiasedness, fixed size, ties, zeros, non-finite values."""

import math

import pytest
import torch
from oracle import inclusion_probabilities
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.replacements.linear import sparse_linear_backward
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.scores import SCORES
from ssprop_passes.selection.selectors import SELECTORS, random, sampled
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile

DRAWS = 20_000
ALL = (True, True, True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def choose(select: str, scores: Tensor, k: int, block: int = 1) -> tuple[Tensor, Tensor]:
    """Return indices and weights, [..., k]; weights are 1 if the selector returns none."""
    selection = Selection(select=SELECTORS[select], block=block)
    groups = scores.shape[:-1].numel()
    indices, weights = selection.choose(scores.flatten(), k, groups)
    indices = (indices % scores.shape[-1]).view(*scores.shape[:-1], k)
    return indices, torch.ones(indices.shape) if weights is None else weights.view(indices.shape)


def draw_factors(select: str, scores: Tensor, k: int) -> Tensor:
    """Return the channels' factors in many draws, [DRAWS, C], 0 if not kept."""
    indices, weights = choose(select, scores.expand(DRAWS, -1), k)
    return torch.zeros(DRAWS, scores.shape[-1]).double().scatter(1, indices, weights.double())


class Site:
    """The backward of a small linear layer whose channels differ in strength."""

    def __init__(self) -> None:
        self.grad_output = torch.randn(5, 16).double() * torch.logspace(-1.5, 0.5, 16)
        self.input, self.weight = torch.randn(5, 7).double(), torch.randn(16, 7).double()

    def backward(self, k: int, selection: Selection) -> Tensor:
        """Return all gradients, concatenated."""
        tensors = self.grad_output, self.input, self.weight
        gradients = sparse_linear_backward(*tensors, k, ALL, selection)
        return torch.cat([g.flatten() for g in gradients])

    def by_channel(self) -> Tensor:
        """Return each channel's share of the dense gradients, [C, all]."""
        whole = self.grad_output
        shares = []
        for channel in range(16):
            self.grad_output = whole * torch.eye(16)[channel]
            shares.append(self.backward(16, Selection()))
        self.grad_output = whole
        return torch.stack(shares)


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("score", SCORES)
def test_sampled_is_unbiased_and_varies_less_than_uniform(score: str, k: int) -> None:
    site = Site()
    shares = site.by_channel()
    scores = SCORES[score](site.grad_output, site.weight)
    factors = draw_factors("sampled", scores, k)
    assert set(factors.count_nonzero(1).tolist()) == {k}
    dense = site.backward(16, Selection())
    torch.testing.assert_close(shares.sum(0), dense)

    draws = factors @ shares
    error = draws.std(0) / math.sqrt(DRAWS)
    assert (draws.mean(0) - dense).abs().le(4 * error + 1e-12).all()

    uniform = draw_factors("random", scores, k) * 16 / k
    assert (uniform @ shares).mean(0).sub(dense).norm() < 0.2 * dense.norm()
    assert draws.var(0).sum() < 0.9 * (uniform @ shares).var(0).sum()


@pytest.mark.slow
def test_sampled_is_unbiased_over_single_draws() -> None:
    site = Site()
    selection = Selection(score=SCORES["l2"], select=sampled)
    draws = torch.stack([site.backward(4, selection) for _ in range(DRAWS)])
    rows = draws[:, 5 * 7 : 5 * 7 + 16 * 7].view(DRAWS, 16, 7)
    assert set(rows.any(2).sum(1).tolist()) == {4}
    error = draws.std(0) / math.sqrt(DRAWS)
    dense = site.backward(16, Selection())
    assert (draws.mean(0) - dense).abs().le(4 * error + 1e-12).all()


@pytest.mark.parametrize("k", [1, 3, 8, 12])
def test_sampled_keeps_channels_as_often_as_it_says(k: int) -> None:
    scores = torch.tensor([0.5, 3, 0, 1, 1, 40, 2, 0.01, 1, 7, 0.2, 1]).double()
    p = inclusion_probabilities(scores, k)
    factors = draw_factors("sampled", scores, k)
    torch.testing.assert_close(factors.amax(0), 1 / p)
    often = (factors > 0).double().mean(0)
    assert (often - p).abs().le(4 * (p * (1 - p) / DRAWS).sqrt() + 1e-12).all()
    assert (factors[:, p == 1] == 1).all(), "certain winners have weight 1"


def test_sampled_rounds_small_channels_to_a_threshold() -> None:
    # As in the stochastic pruning of Ye et al., each small score becomes the threshold or zero.
    scores = torch.tensor([0.5, 3, 0.3, 1, 1, 40, 2, 0.1, 1, 7, 0.2, 1]).double()
    rounded = (draw_factors("sampled", scores, 6) * scores)[:100]
    threshold = rounded.max(0).values.min()
    small = scores < threshold
    assert 0 < small.sum() < 12
    is_threshold = (rounded[:, small] - threshold).abs() < 1e-6
    assert (is_threshold | (rounded[:, small] == 0)).all()
    torch.testing.assert_close(rounded[:, ~small], scores[~small].expand(100, -1))


def test_random_is_uniform() -> None:
    often = (draw_factors("random", torch.arange(10.0), 3) > 0).double().mean(0)
    assert (often - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / DRAWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("select", SELECTORS)
def test_all_channels(select: str, dtype: torch.dtype) -> None:
    for scores in (torch.rand(31), torch.zeros(31), torch.ones(31), torch.rand(1), torch.zeros(1)):
        indices, weights = choose(select, scores.to(dtype), len(scores))
        assert indices.sort().values.tolist() == list(range(len(scores)))
        assert (weights == 1).all()
    # Rounding must not change this.
    assert (choose(select, torch.rand(1000, 31).to(dtype), 31)[1] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("select", SELECTORS)
def test_size_is_fixed_whatever_the_scores(select: str, dtype: torch.dtype) -> None:
    nonzero = torch.zeros(40)
    nonzero[3:7] = torch.rand(4)
    huge = torch.rand(40) * 6e4
    tiny = torch.rand(40) * 1e-7
    skewed = torch.logspace(-6, 3, 40)
    for scores in (torch.zeros(40), torch.ones(40), nonzero, huge, tiny, skewed):
        for k in (1, 2, 7, 20, 39):
            indices, weights = choose(select, scores.to(dtype).expand(50, -1), k)
            assert indices.shape == (50, k)
            assert all(len(set(row)) == k for row in indices.tolist())
            assert weights.isfinite().all()
            assert (weights >= 1).all()
            if select != "random" and scores is nonzero and k >= 4:
                assert all({3, 4, 5, 6} <= set(row) for row in indices.tolist())


def test_sampled_is_uniform_without_scores() -> None:
    factors = draw_factors("sampled", torch.zeros(12), 3)
    assert factors.unique().tolist() == [0, 4]
    assert ((factors > 0).double().mean(0) - 0.25).abs().max() < 4 * math.sqrt(3 / 16 / DRAWS)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("select", SELECTORS)
def test_what_is_not_finite_comes_first(select: str, bad: float, block: int) -> None:
    scores = torch.rand(30, 40)
    scores[:, [5, 21]] = bad
    for k in (8, 20):
        indices, weights = choose(select, scores, k, block)
        assert all({5, 21} <= set(row) for row in indices.tolist())
        assert weights.isfinite().all()
        assert (weights[(indices == 5) | (indices == 21)] == 1).all()
    scores[:, :25] = bad
    indices, weights = choose(select, scores, 8, block)
    assert all(max(row) < (25 if block == 1 else 28) for row in indices.tolist())
    assert (weights == 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("select", SELECTORS)
def test_what_is_not_finite_reaches_the_gradients(select: str, score: str, bad: float) -> None:
    site = Site()
    site.grad_output[3, 9] = bad
    selection = Selection(score=SCORES[score], select=SELECTORS[select])
    gradients = sparse_linear_backward(site.grad_output, site.input, site.weight, 2, ALL, selection)
    assert not any(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][9].isfinite().any()


@pytest.mark.parametrize("score", ["l2", "l2_weight"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_of_half_precision_do_not_overflow(score: str, dtype: torch.dtype) -> None:
    scores = SCORES[score](torch.full((512, 4), 3e4).to(dtype), torch.ones(4, 300).to(dtype))
    assert scores.dtype is torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("select", SELECTORS)
def test_groups_are_selected_from_by_themselves(select: str) -> None:
    selection = Selection(select=SELECTORS[select], block=2)
    scores = torch.rand(24) * torch.tensor([1.0, 100, 0]).repeat_interleave(8)
    indices, _ = selection.choose(scores, 4, groups=3)
    assert indices.view(3, 4).sort().values.div(8, rounding_mode="floor").tolist() == [
        [0] * 4,
        [1] * 4,
        [2] * 4,
    ]
    assert set((indices // 2 * 2).tolist()) | set((indices // 2 * 2 + 1).tolist()) == set(
        indices.tolist()
    )


def test_names_what_a_function_of_ones_own_got_wrong() -> None:
    site = Site()
    cases = {
        "score must return one score per channel, shape .16,., got torch.float64 of shape .5.": {
            "score": lambda grad_output, weight: grad_output.abs().mean(1)
        },
        "score must return one score per channel, shape .16,., got a float": {
            "score": lambda grad_output, weight: 1.0
        },
        "select must return int64 indices, k of each group, .* got torch.float64": {
            "select": lambda scores, k: scores.double()
        },
        "select must return int64 indices, .* with k = 4 got torch.int64 of shape .3.": {
            "select": lambda scores, k: torch.topk(scores, k - 1).indices
        },
        "select must return int64 indices, .* got a list": {"select": lambda scores, k: [0] * k},
    }
    for message, functions in cases.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            site.backward(4, Selection(**functions))


def fail(*_args: object) -> Tensor:
    raise KeyError("stem")


@pytest.mark.parametrize("argument", ["score", "select"])
def test_an_error_in_a_function_of_ones_own_names_the_argument(argument: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{argument} failed with KeyError: 'stem'$"):
        Site().backward(4, Selection(**{argument: fail}))
    config = SparsityConfig(min_channels=1, **{argument: fail})
    model = compile_with(config)
    with pytest.raises(SsPropCompileError, match=f"{argument} failed with KeyError: 'stem'"):
        model(torch.randn(4, 8))


FEWER = {
    "one fewer": lambda scores, k: torch.topk(scores, k - 1).indices,
    "half": lambda scores, k: torch.topk(scores, (k + 1) // 2).indices,
    "a fixed number": lambda scores, k: torch.topk(scores, 3).indices,
}
RIGHT = {
    "a slice": lambda scores, k: scores.argsort(-1, descending=True)[..., :k],
    "two parts": lambda scores, k: torch.cat(
        [torch.topk(scores, (k + 1) // 2).indices, torch.topk(-scores, k // 2).indices]
    ),
}


def compile_with(config: SparsityConfig) -> nn.Module:
    model, scheduler = nn.Linear(8, 32), SparsityScheduler(constant(0.5))
    return ssprop_compile(model, scheduler, config=config, backend="aot_eager")


@pytest.mark.parametrize("name", FEWER)
def test_too_few_channels_are_refused_if_k_is_read_at_run_time(name: str) -> None:
    model = compile_with(SparsityConfig(min_channels=1, select=FEWER[name]))
    with pytest.raises(SsPropCompileError, match=r"select must return .* with k = u\d+ got"):
        model(torch.randn(4, 8))


@pytest.mark.parametrize("name", RIGHT)
def test_k_channels_are_recognised_if_k_is_read_at_run_time(name: str) -> None:
    model = compile_with(SparsityConfig(min_channels=1, select=RIGHT[name]))
    model(torch.randn(4, 8)).square().sum().backward()
    assert int(model.weight.grad.any(1).sum()) == 16


def test_random_numbers_are_those_of_the_seed() -> None:
    scores = torch.rand(64)
    for select in (random, sampled):
        drawn = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(Selection(select=select).choose(scores, 16)[0].tolist())
        assert drawn[0] == drawn[1] != drawn[2]
