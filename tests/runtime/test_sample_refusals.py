"""`axis="sample"`: models that return their loss, and models that it cannot serve."""

from typing import Any

import pytest
import torch
from oracle import relative_error
from sample_models import BATCH, Net, compile_net, expected, found, images, loss
from ssprop_passes.errors import NoEffectWarning, SsPropCompileError
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("error::ssprop_passes.errors.NoEffectWarning")


@pytest.mark.parametrize(
    ("backend", "with_logits"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        ("inductor", False),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_a_model_that_returns_its_loss(with_logits: bool, backend: str) -> None:
    """Samples are chosen by the gradient of the logits, inside the graph."""

    class Loss(Net):
        def forward(self, x: Tensor, labels: Tensor) -> Any:
            logits = super().forward(x)
            value = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
            return {"loss": value, "logits": logits} if with_logits else value

    is_double = backend == "aot_eager"
    model, x = Loss(), images()
    model, x = (model.double(), x) if is_double else (model, x.float())
    labels = torch.randint(4, (BATCH,))
    plain = Net().to(x.dtype)
    plain.load_state_dict(model.state_dict())
    want = expected(
        plain,
        x,
        loss=lambda logits: nn.functional.cross_entropy(logits, labels, label_smoothing=0.1),
    )
    compiled = compile_net(model, backend=backend)
    output = compiled(x, labels)
    (output["loss"] if with_logits else output).backward()
    assert relative_error(found(model), want) < (1e-9 if is_double else 1e-4)


def test_a_model_that_moves_samples_says_so() -> None:
    class Flipped(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + x.flip(0))

    model, x = Flipped().double(), images()
    compiled = compile_net(model)
    with pytest.warns(NoEffectWarning, match=r"aten\.flip\.default moves or mixes samples"):
        loss(compiled(x)).backward()
    got = found(model)
    loss(model(x)).backward()
    assert relative_error(got, found(model)) < 1e-9


def test_a_model_that_fixes_the_batch_says_so() -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[0] == BATCH else 2 * x)

    model, x = Fixed().double(), images()
    with pytest.warns(NoEffectWarning, match="the model makes the batch size a constant, 6"):
        loss(compile_net(model)(x)).backward()


def test_compiled_autograd_is_refused() -> None:
    model, x = Net().double(), images()
    value = loss(compile_net(model)(x))
    compiler = torch.compile(backend="aot_eager")
    with (
        torch._dynamo.compiled_autograd._enable(compiler),
        pytest.raises(Exception, match="compiled autograd"),
    ):
        value.backward()


def test_the_marker_never_runs() -> None:
    with pytest.raises(SsPropCompileError, match="compiled autograd does not work"):
        torch.ops.ssprop.kept_samples(torch.ones(2), torch.ones(1, dtype=torch.int64))
