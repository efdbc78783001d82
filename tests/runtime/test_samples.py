"""`axis="sample"` end to end: gradients of the kept samples, in every way that people train."""

import copy
from typing import Any

import pytest
import torch
from oracle import relative_error
from sample_models import BATCH, KEPT, Net, check, compile_net, expected, found, images, loss
from ssprop_passes.errors import NoEffectWarning
from ssprop_passes.selection.samples import choose_samples
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssprop_fx import SparsityConfig, SparsityScheduler, ssprop_compile
from ssprop_fx.compiler import sample_choice

pytestmark = pytest.mark.filterwarnings("error::ssprop_passes.errors.NoEffectWarning")


class Tuple(Net):
    """Returns several outputs."""

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        return self.head(features), features


class Checkpointed(Net):
    """The backward computes most of the forward again."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.features, x, use_reentrant=False))


class TimeFirst(nn.Module):
    """The batch is the second dimension: [T, N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        # Tokens are merged with the batch, which is the inner one of the two.
        x = torch.tanh(x.transpose(0, 1).reshape(-1, 8)).view(x.shape[1], x.shape[0], 8)
        return self.head(self.layer(x))[0]


@pytest.mark.parametrize("saved", ["all", "kept"])
@pytest.mark.parametrize("kind", [Net, Tuple, Checkpointed])
def test_gradients_are_those_of_the_kept_samples(kind: type[Net], saved: str) -> None:
    model = kind().double()
    check(model, compile_net(model, config={"saved": saved}), images())


def test_the_batch_may_be_a_later_dimension() -> None:
    model = TimeFirst().double()
    x = torch.randn(BATCH, 5, 8, dtype=torch.float64)
    check(model, compile_net(model), x)


@pytest.mark.parametrize("saved", ["all", pytest.param("kept", marks=pytest.mark.slow)])
def test_inductor(saved: str) -> None:
    model, x = Net(), images().float()
    compiled = compile_net(model, backend="inductor", config={"saved": saved})
    want = expected(model, x)
    loss(compiled(x)).backward()
    assert relative_error(found(model), want) < 1e-4


def test_one_compile_serves_every_batch_and_rate() -> None:
    model = Net().double()
    # Forty rates, one a step.
    scheduler = SparsityScheduler(lambda step: 0.5 if step < 5 else (step % 40 + 1) / 42)
    compiled = ssprop_compile(
        model, scheduler, config=SparsityConfig(axis="sample"), backend="aot_eager"
    )
    check(model, compiled, images())
    graphs = len(compiled.ssprop.backend.graphs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (8, 11, 4):
            check(model, compiled, images(batch), batch // 2)
        x = images(24)
        for _ in range(45):
            scheduler.step()
            loss(compiled(x)).backward()
            found(model)
            kept = max(int(24 * (1 - scheduler.drop_rate) + 1e-9), 1)
            assert compiled.ssprop.kept_samples == (kept, 24)
        check(model, compiled, x, kept)
    assert len(compiled.ssprop.backend.graphs) == graphs


@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_all_but_one_and_a_single_sample(rate: float) -> None:
    model = Net().double()
    check(model, compile_net(model, rate), images(), 5 if rate == 0.1 else 1)


def test_a_batch_of_one_is_kept() -> None:
    model = Net().double()
    compiled = compile_net(model)
    check(model, compiled, images(1), 1)
    check(model, compiled, images(), KEPT)


def test_an_empty_batch_is_whole() -> None:
    model = nn.Linear(3, 2).double()
    compile_net(model)(torch.empty(0, 3, dtype=torch.float64)).sum().backward()
    assert model.weight.grad is not None
    assert not model.weight.grad.any()


def test_inputs_get_gradients_of_the_whole_batch() -> None:
    model, x = Net().double(), images().requires_grad_()
    want = expected(model, x)
    loss(compile_net(model)(x)).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want["input 0"])
    assert (x.grad.flatten(1).any(1).sum()) == KEPT


def test_accumulation_keeps_a_choice_for_each_forward() -> None:
    model = Net().double()
    compiled = compile_net(model)
    x, y = images(), images()
    want = expected(model, x)
    for name, gradient in expected(model, y).items():
        want[name] += gradient
    first, second = loss(compiled(x)), loss(compiled(y))
    first.backward()
    second.backward()
    assert relative_error(found(model), want) < 1e-9


def test_a_second_backward_chooses_again() -> None:
    model, x = Net().double(), images()
    want = expected(model, x)
    with torch._functorch.config.patch(donated_buffer=False):
        output = compile_net(model)(x)
        loss(output).backward(retain_graph=True)
        found(model)
        loss(output).backward()
    assert relative_error(found(model), want) < 1e-9


def test_a_second_backward_through_a_loss_chooses_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is made inside the graph, and its weights count each time."""

    class Loss(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin().sum()

    calls: list[int] = []

    def choose(*args: Any) -> Any:
        calls.append(1)
        return choose_samples(*args)

    monkeypatch.setattr(sample_choice, "choose_samples", choose)
    model, x = Loss().double(), images()
    with torch._functorch.config.patch(donated_buffer=False):
        value = compile_net(model, config={"select": "sampled"})(x)
        value.backward(retain_graph=True)
        value.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("layout", ["tokens first", "classes first"])
def test_other_dimensions_of_an_output_may_have_the_batch_size(layout: str) -> None:
    """Only the graph knows which of two equal sizes is the batch."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 8), nn.Linear(8, BATCH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(torch.tanh(self.first(x)))
            if layout == "tokens first":
                return y.transpose(0, 1)
            return y.mean(1).t()

    def by_sample(output: Tensor) -> Tensor:
        if layout == "tokens first":
            return output.transpose(0, 1)
        return output.t()

    def loss(output: Tensor, factors: Tensor) -> Tensor:
        y = by_sample(output)
        return (y.sin() * factors.view(-1, *[1] * (y.ndim - 1))).sum()

    torch.manual_seed(0)
    model = Words().double()
    x = torch.randn(BATCH, BATCH, 5, dtype=torch.float64)
    factors = torch.tensor([3.0, 0.01, 9.0, 0.01, 5.0, 0.02], dtype=torch.float64)
    kept = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64)
    loss(model(x), factors * kept).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss(compile_net(model)(x), factors).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) < 1e-12


def test_an_output_of_samples_merged_with_classes_is_whole_and_says_so() -> None:
    class Merged(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flatten(0, 1).view(BATCH, -1)

    model, x = Merged(5, 7).double(), torch.randn(BATCH, 4, 5, dtype=torch.float64)
    model(x).sin().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pytest.warns(NoEffectWarning, match="whole batch"):
        compile_net(model)(x).sin().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert relative_error(found, expected) < 1e-12


def test_an_input_for_the_whole_batch_may_come_first() -> None:
    class Shifted(Net):
        def forward(self, shift: Tensor, x: Tensor) -> Tensor:
            return super().forward(shift + x)

    model, x = Shifted().double(), images()
    plain = Net().double()
    plain.load_state_dict(model.state_dict())
    want = expected(plain, x)
    shift = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    loss(compile_net(model)(shift, x)).backward()
    assert relative_error(found(model), want) < 1e-9


def test_dropout_masks_are_those_of_the_forward() -> None:
    model, x = Net(0.3).double(), images()
    compiled = compile_net(model)
    for saved in ("all", "kept"):
        compiled = compile_net(model, config={"saved": saved})
        torch.manual_seed(1)
        want = expected(model, x)
        torch.manual_seed(1)
        loss(compiled(x)).backward()
        assert relative_error(found(model), want) < 1e-9


def test_a_dict_of_outputs() -> None:
    class Dict(Tuple):
        def forward(self, x: Tensor) -> Any:
            logits, features = super().forward(x)
            return {"logits": logits, "features": features, "name": "net"}

    model, x = Dict().double(), images()
    plain = Tuple().double()
    plain.load_state_dict(model.state_dict())
    want = expected(plain, x)
    output = compile_net(model)(x)
    loss([output["logits"], output["features"]]).backward()
    assert relative_error(found(model), want) < 1e-9


def test_outputs_without_a_gradient() -> None:
    """Only the outputs that the loss uses count."""
    model, x = Tuple().double(), images()
    single = Net().double()
    single.load_state_dict(model.state_dict())
    want = expected(single, x)
    loss(compile_net(model)(x)[0]).backward()
    assert relative_error(found(model), want) < 1e-9


def test_outputs_may_be_changed_in_place() -> None:
    model, x = Tuple().double(), images()
    want = expected(model, x)
    logits, features = compile_net(model)(x)
    logits += 0
    loss((logits, features)).backward()
    assert relative_error(found(model), want) < 1e-9


def test_in_place() -> None:
    model = Net().double()
    want = expected(model, x := images())
    compile_net(model, in_place=True)
    loss(model(x)).backward()
    assert relative_error(found(model), want) < 1e-9


@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic_sizes(dynamic: bool | None) -> None:
    model = Net().double()
    compiled = compile_net(model, dynamic=dynamic)
    check(model, compiled, images())
    check(model, compiled, torch.randn(8, 3, 12, 12, dtype=torch.float64), 4)


def test_autocast_and_a_grad_scaler() -> None:
    model, x = Net(), images().float()
    compiled = compile_net(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = scaler.get_scale()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(compiled(x).float())
        scaler.scale(value * (float("inf") if scaler.get_scale() == before else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        found(model)
    assert scaler.get_scale() < before


def test_copies_of_the_model() -> None:
    model = Net().double()
    compiled = compile_net(model)
    other = copy.deepcopy(compiled)
    x = images()
    check(model, compiled, x)
    check(other._orig_mod, other, x)


def test_channels_inside_kept_samples() -> None:
    """Layers named in `rates` keep some channels as well."""
    model, x = Net().double(), images()
    config = {"rates": {"window": 0.5}, "channel_multiple": 1, "min_channels": 1}
    compiled = compile_net(model, config=config)
    loss(compiled(x)).backward()
    rows = found(model)["window.weight"].any(1)
    assert rows.sum() == 4
    want = expected(model, x)["head.weight"]
    loss(compiled(x)).backward()
    torch.testing.assert_close(found(model)["head.weight"], want)
