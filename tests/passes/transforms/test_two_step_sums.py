"""Sums in two steps: which sums are split, and that the gradients do not change."""

from collections.abc import Sequence

import pytest
import torch
from ssprop_passes.transforms import two_step_sums as sums
from ssprop_passes.transforms.two_step_sums import TwoStepSumsPass
from torch import Tensor, fx, nn

from ssprop_fx.compiler.inductor import compile_aot_eager


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "LARGE", 0)


class Scale(nn.Module):
    """Channels times a scale, whose gradient is a sum over all dimensions except the channels'."""

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 2, channels))
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1 if d == self.dim % x.ndim else 1 for d in range(x.ndim)]
        return x * self.scale.view(shape)


def find_sums(graph: fx.Graph) -> list[tuple[list[int], torch.dtype]]:
    """Return the dimensions and the result dtype of each sum in a graph."""
    sums = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    return [(sorted(node.args[1]), node.meta["val"].dtype) for node in sums]


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list]:
    """Return the scale's gradient when x is the output's, and the sums of the joint graph."""
    found: list = []

    class Record(TwoStepSumsPass):
        def transform(self, graph: fx.Graph) -> None:
            super().transform(graph)
            found.extend(find_sums(graph))

    def backend(gm: fx.GraphModule, inputs: Sequence[Tensor]):
        return compile_aot_eager(gm, inputs, Record(), {})

    model.zero_grad()
    output = torch.compile(model, backend=backend)(x)
    output.backward(x if output.shape == x.shape else torch.ones_like(output))
    return model.scale.grad, found


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("model", "x", "steps"),
    [
        (Scale(6).double(), images(), [[3], [0, 2, 3]]),
        (Scale(6, dim=-1).double(), torch.randn(4, 5, 6, dtype=torch.float64), [[1], [0, 1]]),
        (Scale(6).double(), images().contiguous(), [[0, 2, 3]]),
        (Scale(6, dim=-1).double(), torch.randn(9, 6, dtype=torch.float64), [[0]]),
    ],
    ids=["channels last", "tokens", "contiguous", "matrix"],
)
def test_sums_over_all_but_the_innermost_are_split(
    model: Scale, x: Tensor, steps: list[list[int]], dynamic: bool
) -> None:
    model.zero_grad()
    model(x).backward(x)
    expected = model.scale.grad
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    found, made = run(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert [dims for dims, _ in made] == steps


def test_nothing_is_rounded_between_the_steps() -> None:
    model = Scale(6).bfloat16()
    _, made = run(model, images(torch.bfloat16))
    assert made == [([3], torch.float32), ([0, 2, 3], torch.bfloat16)]


def test_what_a_cache_holds_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    for large, steps in [(x.nbytes, [[3], [0, 2, 3]]), (x.nbytes + 1, [[0, 2, 3]])]:
        monkeypatch.setattr(sums, "LARGE", large)
        torch.compiler.reset()
        _, made = run(Scale(6).double(), x)
        assert [dims for dims, _ in made] == steps


def test_sums_of_the_forward_stay() -> None:
    class Forward(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum((0, 2, 3)) * self.scale

    _, made = run(Forward(6).double(), images())
    assert made == [([0, 2, 3], torch.float64)]


@pytest.mark.slow
def test_batch_norm_under_inductor() -> None:
    norm = nn.BatchNorm2d(6).double()
    x = images().requires_grad_()
    (norm(x) ** 3).sum().backward()
    expected = [x.grad, norm.weight.grad, norm.bias.grad]
    ran = TwoStepSumsPass()
    x.grad = None
    norm.zero_grad()
    compiled = torch.compile(norm, options={"joint_custom_pre_pass": ran})
    (compiled(x) ** 3).sum().backward()
    assert ran.ran
    found = [x.grad, norm.weight.grad, norm.bias.grad]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_rows_that_only_the_run_knows_stay() -> None:
    """An example is a sum over the kept samples of a batch."""

    class Chosen(Scale):
        def forward(self, x: Tensor) -> Tensor:
            chosen = x[x[:, 0, 0, 0].nonzero()[:, 0]]
            return super().forward(chosen)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        gradient, made = run(Chosen(6).double(), images())
    assert made == [([0, 2, 3], torch.float64)]
    torch.testing.assert_close(gradient, images().square().sum((0, 2, 3)))
