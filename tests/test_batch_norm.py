"""Squares of a batch norm's gradient: where the sums are found, and that they are right."""

import functools
from collections.abc import Callable

import pytest
import torch
from ssprop_passes.batch_norm import BatchNormSquares
from ssprop_passes.rewrite import INSERTED_KEY
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.compilers import inductor_decompositions

Norm = Callable[[Tensor], Tensor]


def squares_of(norm: Norm, x: Tensor, grad: Tensor, over: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return the squares of the gradient of x, summed over some dimensions and then others."""
    with torch.enable_grad():
        (dx,) = torch.autograd.grad(norm(x), x, grad)
    squares = dx.float() ** 2 if dx.dtype == torch.bfloat16 else dx**2
    for dims in over:
        squares = squares.sum(dims)
    return squares


def trace(fn: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    tracer = make_fx(
        fn, inductor_decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True
    )
    return tracer(*inputs)


def rewrite(fn: Callable[..., Tensor], *inputs: Tensor) -> tuple[fx.GraphModule, BatchNormSquares]:
    """Trace a function, and run the pass on it as if all squares were the sparse backward's."""
    traced = trace(fn, *inputs)
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.pow.Tensor_Scalar:
            node.meta[INSERTED_KEY] = True
    squares = BatchNormSquares(None, inductor_decompositions)
    squares.transform(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    return traced, squares


def check(
    norm: Norm, x: Tensor, over: tuple[tuple[int, ...], ...], rewritten: int = 1, **tolerance: float
) -> None:
    x = x.requires_grad_()
    grad = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    fn = functools.partial(squares_of, norm, over=over)
    expected = fn(x, grad)
    traced, squares = rewrite(fn, x, grad)
    assert squares.rewritten == rewritten
    found = traced(x, grad)
    assert bool((expected > 0).all())
    torch.testing.assert_close(found, expected, **{"rtol": 1e-9, "atol": 0.0, **tolerance})


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random numbers with another mean and spread a channel, the first one's tiny."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    channels = [-1 if d == 1 else 1 for d in range(len(shape))]
    spread = torch.logspace(-3, 1, shape[1], dtype=torch.float64).view(channels)
    mean = torch.linspace(-3, 4, shape[1], dtype=torch.float64).view(channels)
    return (x * spread + mean).to(dtype)


def norm_of(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(-2, 3.5, parameter.numel()))
    return norm.double()


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
    """The sums are those of what was not rounded yet, so they differ by its rounding."""
    norm = norm_of(nn.BatchNorm2d(6)).float()
    x = data(8, 6, 9, 9, dtype=torch.bfloat16)
    check(norm, x, ((2, 3), (0,)), rtol=1e-2)


def own_norm(factor: float, of: int = 1) -> Norm:
    """Return a batch norm written by hand, right where factor and `of` are 1."""

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
    squares = BatchNormSquares(None, dict)
    squares.transform(traced.graph)
    assert squares.rewritten == 0


def test_what_is_not_finite_is_found() -> None:
    """A `GradScaler` looks for it, so that a channel which holds it must be kept."""
    x, grad = data(4, 6, 5, 7).requires_grad_(), torch.ones(4, 6, 5, 7, dtype=torch.float64)
    fn = functools.partial(squares_of, norm_of(nn.BatchNorm2d(6)), over=((2, 3), (0,)))
    traced, _ = rewrite(fn, x, grad)
    for value in (float("nan"), float("inf")):
        grad[1, 2, 3, 4] = value
        assert traced(x, grad).isfinite().tolist() == [True, True, False, True, True, True]


class Net(nn.Module):
    """Convolutions before a norm, and one before none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.third = nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


@pytest.mark.parametrize(("score", "rewritten"), [("l2", 2), ("mean_abs", 0)])
def test_gradients_under_inductor(
    monkeypatch: pytest.MonkeyPatch, score: str, rewritten: int
) -> None:
    counts: list[int] = []

    class Recording(BatchNormSquares):
        def transform(self, graph: fx.Graph) -> None:
            super().transform(graph)
            counts.append(self.rewritten)

        def uuid(self) -> None:
            return None

    monkeypatch.setattr("ssprop_fx.backend.BatchNormSquares", Recording)
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    gradients = []
    for backend in ("aot_eager", "inductor"):
        model.zero_grad()
        config = SparsityConfig(score=score, gate=False)
        scheduler = SparsityScheduler(constant(0.7))
        compiled = ssprop_compile(model, scheduler, config=config, backend=backend)
        compiled(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)
    assert counts == [rewritten]
