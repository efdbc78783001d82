"""A batch norm's gradient: where the pass finds its squares and gathers, and their values."""

import functools

import pytest
import torch
from norms import Norm, data, norm_of, rewrite, trace
from ssprop_passes.graph.graph_pass import PassSummary
from ssprop_passes.transforms.batch_norm import BatchNormGradientPass
from torch import Tensor, fx, nn
from torch.nn import functional

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile


def squares_of(norm: Norm, x: Tensor, grad: Tensor, over: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return the squares of the gradient of x, summed over some dimensions and then others."""
    with torch.enable_grad():
        (dx,) = torch.autograd.grad(norm(x), x, grad)
    squares = dx.float() ** 2 if dx.dtype == torch.bfloat16 else dx**2
    for dims in over:
        squares = squares.sum(dims)
    return squares


def check(
    norm: Norm, x: Tensor, over: tuple[tuple[int, ...], ...], rewritten: int = 1, **tolerance: float
) -> None:
    x = x.requires_grad_()
    grad = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    fn = functools.partial(squares_of, norm, over=over)
    expected = fn(x, grad)
    traced, bn_pass = rewrite(fn, x, grad)
    assert (bn_pass.squares, bn_pass.gathers) == (rewritten, 0)
    found = traced(x, grad)
    assert bool((expected > 0).all())
    torch.testing.assert_close(found, expected, **{"rtol": 1e-9, "atol": 0.0, **tolerance})


@pytest.mark.parametrize(
    ("norm", "shape", "over"),
    [
        (nn.BatchNorm2d(6), (4, 6, 5, 7), ((2, 3), (0,))),
        (nn.BatchNorm2d(6), (4, 6, 5, 7), ((0, 2, 3),)),
        (nn.BatchNorm2d(6, affine=False), (4, 6, 5, 7), ((0, 2, 3),)),
        (nn.BatchNorm2d(6, eps=0.1), (4, 6, 5, 7), ((0, 2, 3),)),
        (nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 5, 7), ((0, 2, 3),)),
        (nn.BatchNorm1d(6), (8, 6), ((0,),)),
        (nn.BatchNorm1d(6), (4, 6, 9), ((2,), (0,))),
        (nn.BatchNorm3d(6), (2, 6, 3, 4, 5), ((2, 3, 4), (0,))),
    ],
    ids=["2d", "one step", "not affine", "eps", "no statistics", "matrix", "1d", "3d"],
)
def test_squares_come_from_the_sums(
    norm: nn.Module, shape: tuple[int, ...], over: tuple[tuple[int, ...], ...]
) -> None:
    check(norm_of(norm), data(*shape), over)


def test_squares_behind_what_the_norm_feeds() -> None:
    norm = norm_of(nn.BatchNorm2d(6))
    check(lambda x: functional.silu(norm(x)) * 2, data(4, 6, 5, 7), ((2, 3), (0,)))


def test_squares_of_a_gradient_that_is_rounded() -> None:
    """The sums are over numbers before they are rounded, so they differ by the rounding."""
    norm = norm_of(nn.BatchNorm2d(6)).float()
    x = data(8, 6, 9, 9, dtype=torch.bfloat16)
    check(norm, x, ((2, 3), (0,)), rtol=1e-2)


def own_norm(factor: float, of: int = 1) -> Norm:
    """Return a batch norm written by hand; it is right if factor and `of` are 1."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            var, mean = torch.var_mean(
                x if of == 1 else x * of, [0, 2, 3], correction=0, keepdim=True
            )
            ctx.save_for_backward(x, mean, torch.rsqrt(var + 1e-5))
            return (x - mean) * torch.rsqrt(var + 1e-5)

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            x, mean, inverse = ctx.saved_tensors
            share = factor / (g.numel() / g.shape[1])
            over = (0, 2, 3)
            inverse_1d = inverse.squeeze((0, 2, 3))
            total, dot = g.sum(over), (g * (x - mean)).sum(over)
            m = (total * share).view(1, -1, 1, 1)
            p = ((dot * share) * (inverse_1d * inverse_1d)).view(1, -1, 1, 1)
            return (g - (x - mean) * p - m) * inverse_1d.view(1, -1, 1, 1)

    return Own.apply


def test_a_norm_of_ones_own_is_recognised_by_what_it_computes() -> None:
    check(own_norm(1.0), data(4, 6, 5, 7), ((2, 3), (0,)))


@pytest.mark.parametrize(
    "norm",
    [
        own_norm(2.0),
        own_norm(1.0, of=2),
        nn.BatchNorm2d(6).double().eval(),
        nn.GroupNorm(3, 6).double(),
        nn.GroupNorm(6, 6).double(),
        nn.LayerNorm([6, 5, 7]).double(),
        nn.Conv2d(6, 6, 1).double(),
    ],
    ids=["another share", "another mean", "eval", "groups", "instance", "layer", "no norm"],
)
def test_other_gradients_are_left(norm: Norm) -> None:
    check(norm, data(4, 6, 5, 7), ((2, 3), (0,)), rewritten=0)


@pytest.mark.parametrize("over", [((2, 3),), ((0, 1), (1,)), ((1,), (0, 1, 2))])
def test_other_sums_are_left(over: tuple[tuple[int, ...], ...]) -> None:
    check(norm_of(nn.BatchNorm2d(6)), data(4, 6, 5, 7), over, rewritten=0)


def test_squares_of_others_are_left() -> None:
    fn = functools.partial(squares_of, norm_of(nn.BatchNorm2d(6)), over=((0, 2, 3),))
    x = data(4, 6, 5, 7).requires_grad_()
    traced = trace(fn, x, data(4, 6, 5, 7))
    bn_pass = BatchNormGradientPass(dict)
    bn_pass.transform(traced.graph)
    assert bn_pass.squares == 0


def test_what_is_not_finite_is_found() -> None:
    """A `GradScaler` looks for such a value, so a channel that holds one must be kept."""
    x, grad = data(4, 6, 5, 7).requires_grad_(), torch.ones(4, 6, 5, 7, dtype=torch.float64)
    fn = functools.partial(squares_of, norm_of(nn.BatchNorm2d(6)), over=((2, 3), (0,)))
    traced, _ = rewrite(fn, x, grad)
    for value in (float("nan"), float("inf")):
        grad[1, 2, 3, 4] = value
        assert traced(x, grad).isfinite().tolist() == [True, True, False, True, True, True]


class Net(nn.Module):
    """Two convolutions before a norm, and one without a norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.third = nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


@pytest.mark.parametrize(
    ("score", "channels_last", "dtype", "counts"),
    [
        pytest.param("l2", False, torch.float64, (2, 0, 0), marks=pytest.mark.slow),
        pytest.param("l2", True, torch.float64, (2, 2, 0), marks=pytest.mark.slow),
        ("l2", True, torch.float32, (2, 2, 2)),
        pytest.param("l2", True, torch.bfloat16, (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("mean_abs", True, torch.float64, (0, 0, 0), marks=pytest.mark.slow),
    ],
)
def test_gradients_under_inductor(
    monkeypatch: pytest.MonkeyPatch,
    score: str,
    channels_last: bool,
    dtype: torch.dtype,
    counts: tuple[int, int, int],
) -> None:
    """bfloat16 runs under autocast."""
    found: list[tuple[int, int, int]] = []

    class Recording(BatchNormGradientPass):
        def transform(self, graph: fx.Graph) -> PassSummary:
            summary = super().transform(graph)
            found.append((self.squares, self.gathers, self.own))
            return summary

        def uuid(self) -> None:
            return None

    monkeypatch.setattr("ssprop_fx.compiler.passes.BatchNormGradientPass", Recording)
    torch.manual_seed(0)
    is_half = dtype == torch.bfloat16
    stored = torch.float32 if is_half else dtype
    model = Net().to(stored)
    x = torch.randn(4, 3, 12, 12, dtype=stored)
    if channels_last:
        model, x = (part.to(memory_format=torch.channels_last) for part in (model, x))
    gradients = []
    for backend in ("aot_eager", "inductor"):
        model.zero_grad()
        config = SparsityConfig(score=score, gate=False)
        scheduler = SparsityScheduler(constant(0.7))
        compiled = ssprop_compile(model, scheduler, config=config, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            output = compiled(x)
        output.to(stored).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    rtol, atol = {
        torch.float64: (1e-9, 1e-12),
        torch.float32: (1e-4, 1e-6),
        torch.bfloat16: (5e-2, 1e-3),
    }[dtype]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=rtol, atol=atol)
    assert found == [counts]
