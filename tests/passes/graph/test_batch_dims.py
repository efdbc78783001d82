"""Batch dimensions: where tensors hold the samples, against values that carry their sample."""

from collections.abc import Callable

import pytest
import torch
from ssprop_passes.graph.batch_dim import BATCH_DIM_KEY, BatchDim, size_expr
from ssprop_passes.graph.batch_dims import find_batch_dims
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

BATCH, OTHER = 5, 7


def traced(fn: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[fx.GraphModule, object]:
    """Trace a function of tensors whose leading dimension of size `BATCH` is the batch."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [
        mode.from_tensor(
            torch.zeros(shape),
            symbolic_context=StatelessSymbolicContext(
                [DimDynamic.DUCK if size == BATCH else DimDynamic.STATIC for size in shape]
            ),
        )
        for shape in shapes
    ]
    with mode:
        graph = make_fx(fn, tracing_mode="real")(*fakes)
    sizes = [size for fake in fakes for size in fake.shape if not isinstance(size, int)]
    return graph, size_expr(sizes[0])


def owners(position: BatchDim, shape: tuple[int, ...], size: int) -> Tensor:
    """Return the sample of each entry of a tensor, as a position claims."""
    owner = torch.arange(shape[position.dim]) // int(position.inner) % size
    return owner.view(-1, *[1] * (len(shape) - position.dim - 1)).expand(shape)


VIEWS = {
    "flatten": lambda x: x.flatten(0, 1),
    "flatten all": lambda x: x.flatten(),
    "batch second": lambda x: x.transpose(0, 1).flatten(0, 1),
    "batch third": lambda x: x.permute(1, 2, 0).flatten(),
    "batch in the middle": lambda x: x.permute(1, 0, 2).flatten(),
    "windows": lambda x: x.view(-1, 2, 3, 4).transpose(1, 2).reshape(-1, 2, 4),
    "there and back": lambda x: x.flatten(0, 1).sin().view(-1, 6, 4).transpose(0, 1).flatten(0, 1),
    "stacked": lambda x: torch.cat([x, x + 0]).flatten(),
    "split of merged": lambda x: x.transpose(0, 1).flatten(0, 1).split(2, 1)[1],
    "unsqueezed": lambda x: x.flatten(0, 1)[:, None].expand(-1, 3, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_positions_are_those_of_the_values(view: Callable[[Tensor], Tensor]) -> None:
    graph, batch = traced(view, (BATCH, 6, 4))
    assert find_batch_dims(graph.graph, batch) == {}
    node = graph.graph.output_node().args[0]
    # Another batch size shows that the position holds for all.
    samples = torch.arange(3.0)[:, None, None].expand(3, 6, 4)
    result = view(samples) if "sin" not in str(graph.code) else None
    if result is None:
        result = samples.flatten(0, 1).view(-1, 6, 4).transpose(0, 1).flatten(0, 1)
    claimed = owners(node.meta[BATCH_DIM_KEY], tuple(result.shape), 3)
    torch.testing.assert_close(claimed.to(result), result)


MIXING = {
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "flat roll": lambda x: x.roll(1),
    "cumsum": lambda x: x.cumsum(0),
    "softmax": lambda x: x.softmax(0),
    "sort": lambda x: x.sort(0).values,
    "first sample": lambda x: x[0],
    "permuted": lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)],
    "all but one": lambda x: x[1:],
    "products of samples": lambda x: x.flatten(1) @ x.flatten(1).t(),
    "nonzero": lambda x: x.nonzero(),
    "first rows": lambda x: x.flatten(0, 1)[: x.shape[0]],
    "pieces of rows": lambda x: x.flatten(0, 1).split(x.shape[0])[0],
    "rows of a storage": lambda x: x.as_strided((x.shape[0], 4), (1, 1)),
    "not from the first sample": lambda x: torch.cat([x, x])[1 : x.shape[0] + 1],
    "convolution": lambda x: torch.conv1d(x.permute(1, 2, 0), torch.ones(4, 4, 3), padding=1),
    "orders": lambda x: x.flatten(0, 1) + x.transpose(0, 1).flatten(0, 1),
}


@pytest.mark.parametrize("fn", MIXING.values(), ids=MIXING.keys())
def test_what_moves_or_mixes_samples_is_found(fn: Callable[[Tensor], Tensor]) -> None:
    graph, batch = traced(fn, (BATCH, 6, 4))
    assert find_batch_dims(graph.graph, batch)


APART = {
    "flip": lambda x: x.flip(1),
    "halves": lambda x: torch.cat([x, -x])[x.shape[0] :] + torch.cat([x, -x]).chunk(2)[0],
    "first tokens": lambda x: x[:, :2].flatten(0, 1),
    "strided views": lambda x: x.as_strided((x.shape[0], 4), (24, 1), 4),
    "convolution": lambda x: torch.conv1d(x, torch.ones(3, 6, 3), padding=1),
    "softmax": lambda x: x.softmax(-1),
    "batch norm": lambda x: (x - x.mean(0)) / x.var(0),
    "attention": lambda x: (x @ x.transpose(1, 2)) @ x,
    "a token of each": lambda x: x[torch.arange(x.shape[0]), x[..., 0].argmax(1)],
    "covariance": lambda x: x.flatten(0, 1).t() @ x.flatten(0, 1),
    "one hot": lambda x: torch.zeros_like(x).scatter(1, x[:, :1].long(), 1.0),
}


@pytest.mark.parametrize("fn", APART.values(), ids=APART.keys())
def test_what_keeps_samples_apart_is_left_alone(fn: Callable[[Tensor], Tensor]) -> None:
    graph, batch = traced(fn, (BATCH, 6, 4))
    assert find_batch_dims(graph.graph, batch) == {}
