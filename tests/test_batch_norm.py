"""A batch norm's gradient: where its squares and gathers are found, and that they are right."""

import functools
from collections.abc import Callable

import pytest
import torch
from ssprop_passes.batch_norm import BatchNormGradients
from ssprop_passes.operators import gather_columns, gather_norm_gradient
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


def rewrite(
    fn: Callable[..., Tensor], *inputs: Tensor
) -> tuple[fx.GraphModule, BatchNormGradients]:
    """Trace a function, run the pass on it as if squares and gathers were the sparse backward's."""
    traced = trace(fn, *inputs)
    for node in traced.graph.nodes:
        if node.target in (torch.ops.aten.pow.Tensor_Scalar, torch.ops.aten.index.Tensor):
            node.meta[INSERTED_KEY] = True
    found = BatchNormGradients(None, inductor_decompositions)
    found.transform(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    return traced, found


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
    bn_pass = BatchNormGradients(None, dict)
    bn_pass.transform(traced.graph)
    assert bn_pass.squares == 0


def test_what_is_not_finite_is_found() -> None:
    """A `GradScaler` looks for it, so that a channel which holds it must be kept."""
    x, grad = data(4, 6, 5, 7).requires_grad_(), torch.ones(4, 6, 5, 7, dtype=torch.float64)
    fn = functools.partial(squares_of, norm_of(nn.BatchNorm2d(6)), over=((2, 3), (0,)))
    traced, _ = rewrite(fn, x, grad)
    for value in (float("nan"), float("inf")):
        grad[1, 2, 3, 4] = value
        assert traced(x, grad).isfinite().tolist() == [True, True, False, True, True, True]


def kept_of(
    norm: Norm, x: Tensor, grad: Tensor, indices: Tensor, order: tuple[int, ...] | None
) -> Tensor:
    """Return channels of the gradient of x, which are gathered with the dimensions in `order`."""
    with torch.enable_grad():
        (dx,) = torch.autograd.grad(norm(x), x, grad)
    if order is None:
        return dx[:, indices]
    return dx.permute(order)[..., indices]


LAST = {2: None, 3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}


def check_kept(
    norm: Norm,
    x: Tensor,
    gathers: int = 1,
    own: int = 0,
    kept: Callable[..., Tensor] = kept_of,
    channels_last: bool = True,
    **tolerance: float,
) -> fx.GraphModule:
    def laid_out(x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x

    with torch.no_grad():
        output = norm(x)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    x, grad = laid_out(x).requires_grad_(), laid_out(grad)
    fn = functools.partial(kept, norm, order=LAST[x.ndim] if channels_last else None)
    indices = torch.tensor([4, 0, 3])
    expected = fn(x, grad, indices)
    traced, bn_pass = rewrite(fn, x, grad, indices)
    assert (bn_pass.squares, bn_pass.gathers, bn_pass.own) == (0, gathers, own)
    found = traced(x, grad, indices)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, **{"rtol": 1e-9, "atol": 1e-12, **tolerance})
    return traced


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm2d(6), (4, 6, 5, 7)),
        (nn.BatchNorm2d(6, affine=False), (4, 6, 5, 7)),
        (nn.BatchNorm1d(6), (8, 6)),
        (nn.BatchNorm1d(6), (4, 6, 9)),
        (nn.BatchNorm3d(6), (2, 6, 3, 4, 5)),
    ],
    ids=["2d", "not affine", "matrix", "1d", "3d"],
)
def test_numbers_of_a_channel_are_gathered_first(norm: nn.Module, shape: tuple[int, ...]) -> None:
    traced = check_kept(norm_of(norm), data(*shape))
    (gather,) = traced.graph.find_nodes(op="call_function", target=gather_columns)
    # Scale, mean, mean gradient and projection.
    columns = gather.args[0]
    assert [column.meta["val"].numel() for column in columns] == [6, 6, 6, 6]


def test_kept_channels_of_a_gradient_that_is_rounded() -> None:
    norm = norm_of(nn.BatchNorm2d(6)).float()
    check_kept(norm, data(4, 6, 5, 7, dtype=torch.bfloat16), rtol=2e-2, atol=1e-3)


def plain(*shape: int) -> Tensor:
    """Return random numbers that single precision is enough for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def feeds(*modules: nn.Module) -> nn.Module:
    """Return a norm that feeds some modules, in single precision."""
    norm = norm_of(nn.BatchNorm2d(6))
    return nn.Sequential(norm, *modules).float().to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("modules", "own"),
    [
        ((nn.ReLU(), nn.Conv2d(6, 4, 3)), 1),
        ((nn.Conv2d(6, 4, 3),), 1),
        ((nn.ReLU(),), 0),
        ((nn.SiLU(), nn.Conv2d(6, 4, 3)), 0),
        ((nn.ReLU6(), nn.Conv2d(6, 4, 3)), 0),
        ((nn.Threshold(1, 0), nn.Conv2d(6, 4, 3)), 0),
        ((nn.Threshold(0, 1), nn.Conv2d(6, 4, 3)), 0),
        ((nn.ReLU(), nn.AvgPool2d(1), nn.Conv2d(6, 4, 3)), 0),
    ],
    ids=["relu", "nothing between", "relu alone", "silu", "relu6", "bound", "filled", "pooled"],
)
def test_what_lies_in_memory_is_for_the_kernel_of_our_own(
    modules: tuple[nn.Module, ...], own: int
) -> None:
    """The gradient that a convolution hands down, and the output of the ReLU before it."""
    traced = check_kept(feeds(*modules), plain(4, 6, 5, 7), own=own, rtol=1e-5, atol=1e-5)
    assert len(traced.graph.find_nodes(op="call_function", target=gather_norm_gradient)) == own


def test_a_gradient_that_others_read_too_lies_in_memory() -> None:
    """As behind a residual connection."""

    def kept(
        norm: Norm, x: Tensor, grad: Tensor, indices: Tensor, order: tuple[int, ...]
    ) -> Tensor:
        with torch.enable_grad():
            branch = torch.zeros_like(x).requires_grad_()
            out = torch.relu(norm(x) + branch)
            dx, residual = torch.autograd.grad(out, (x, branch), grad)
        return dx.permute(order)[..., indices] + residual.sum()

    check_kept(feeds(), plain(4, 6, 5, 7), own=1, kept=kept, rtol=1e-5, atol=1e-5)


def test_channels_that_are_not_innermost_are_left() -> None:
    check_kept(norm_of(nn.BatchNorm2d(6)), data(4, 6, 5, 7), gathers=0, channels_last=False)


def test_kept_channels_of_other_gradients_are_left() -> None:
    check_kept(nn.GroupNorm(3, 6).double(), data(4, 6, 5, 7), gathers=0)


def test_a_gradient_that_others_read_is_left() -> None:
    """It is written for them, and the gather reads it."""

    def kept(
        norm: Norm, x: Tensor, grad: Tensor, indices: Tensor, order: tuple[int, ...]
    ) -> Tensor:
        with torch.enable_grad():
            (dx,) = torch.autograd.grad(norm(x), x, grad)
        return dx.permute(order)[..., indices] * dx.abs().sum()

    check_kept(norm_of(nn.BatchNorm2d(6)), data(4, 6, 5, 7), gathers=0, kept=kept)


def test_gathers_of_others_are_left() -> None:
    fn = functools.partial(kept_of, norm_of(nn.BatchNorm1d(6)), order=None)
    x, grad = data(8, 6).requires_grad_(), data(8, 6)
    traced = trace(fn, x, grad, torch.tensor([4, 0]))
    bn_pass = BatchNormGradients(None, dict)
    bn_pass.transform(traced.graph)
    assert bn_pass.gathers == 0


class Net(nn.Module):
    """Convolutions before a norm, and one before none."""

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
    found: list[tuple[int, int, int]] = []

    class Recording(BatchNormGradients):
        def transform(self, graph: fx.Graph) -> None:
            super().transform(graph)
            found.append((self.squares, self.gathers, self.own))

        def uuid(self) -> None:
            return None

    monkeypatch.setattr("ssprop_fx.backend.BatchNormGradients", Recording)
    torch.manual_seed(0)
    model = Net().to(dtype)
    x = torch.randn(4, 3, 12, 12, dtype=dtype)
    if channels_last:
        model, x = (part.to(memory_format=torch.channels_last) for part in (model, x))
    gradients = []
    for backend in ("aot_eager", "inductor"):
        model.zero_grad()
        config = SparsityConfig(score=score, gate=False)
        scheduler = SparsityScheduler(constant(0.7))
        compiled = ssprop_compile(model, scheduler, config=config, backend=backend)
        compiled(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=rtol, atol=atol)
    assert found == [counts]
