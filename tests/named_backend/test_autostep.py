"""Under the no-edit backend the schedule steps by itself, once for each optimizer step."""

import pytest
import torch
from graphs import small_net, sparse_runs
from no_edit import Blocks, compiled, kept_rows, loss, variant
from ssprop_passes.errors import NoEffectWarning
from torch import nn

from ssprop_fx import report
from ssprop_fx.named_backend import autostep as stepping

X = torch.randn(2, 3, 10, 10)


def test_layers_that_dynamo_runs_eagerly_are_named_at_the_end_of_the_step() -> None:
    model = Blocks(nn.Linear(32, 16))
    model_compiled = compiled(model, "bar:rate=0.5,period=2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        loss(model_compiled(torch.randn(4, 32))).backward()
        if step == 1:
            with pytest.warns(NoEffectWarning, match=r"1 layer is in no sparse graph.*: head\."):
                optimizer.step()
        else:
            optimizer.step()  # the warning is an error in these tests: once is enough


def test_the_schedule_advances_with_the_optimizer() -> None:
    model = small_net(32)
    model_compiled = compiled(model, "bar:rate=0.75,period=4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runs = []
    for step in range(6):
        for _ in range(2):  # accumulated batches count as one step
            loss(model_compiled(X)).backward()
        runs.append(sparse_runs(variant(model).backend))
        assert variant(model).scheduler.last_step == step
        optimizer.step()
    assert runs == [0, 0, 2, 4, 4, 4]


def test_evaluation_is_dense_and_does_not_advance() -> None:
    model = small_net(16)
    model_compiled = compiled(model, "constant:rate=0.8")
    loss(model_compiled(X)).backward()
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model_compiled(X), model(X), atol=1e-6)
    # Gradients in eval mode are exact: saliency maps and attacks want these.
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with pytest.warns(NoEffectWarning, match=r"in eval\(\) mode, so this backward was dense"):
        loss(model_compiled(x)).backward()
    loss(model(y)).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    model.train()
    loss(model_compiled(X)).backward()
    assert sparse_runs(variant(model).backend) == 2
    assert variant(model).scheduler.last_step == 0


def test_a_step_that_the_scaler_skips_does_not_advance() -> None:
    model = small_net(16)
    model_compiled = compiled(model, "constant:rate=0.8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for weight, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        scaler.scale(model_compiled(X).sum() * weight).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert variant(model).scheduler.last_step == steps


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer, and is one itself."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: None = None) -> None:
        self.inner.step()


def test_several_optimizers_are_one_step() -> None:
    model = small_net(16)
    stranger = nn.Linear(2, 2)
    model_compiled = compiled(model, "constant:rate=0.8")
    optimizers = [
        torch.optim.SGD(stranger.parameters(), lr=0.1),
        Wrapping(torch.optim.SGD(model[0].parameters(), lr=0.1)),
        torch.optim.Adam(model[3].parameters(), lr=0.1),
    ]
    stranger(torch.randn(2, 2)).sum().backward()
    for step in range(3):
        loss(model_compiled(X)).backward()
        assert variant(model).scheduler.last_step == step
        for optimizer in optimizers:
            optimizer.step()
    optimizers[0].step()
    assert variant(model).scheduler.last_step == 3
    # If only the second optimizer goes on, the schedule follows it.
    loss(model_compiled(X)).backward()
    optimizers[2].step()
    assert variant(model).scheduler.last_step == 4


def test_a_compiled_optimizer_advances_and_is_not_compiled_anew() -> None:
    model = small_net(16)
    model_compiled = compiled(model, "cosine:start=0.1,end=0.9,steps=20")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    counts = []
    for _ in range(12):
        loss(model_compiled(X)).backward()
        step()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert variant(model).scheduler.last_step == 12
    assert counts[2] == counts[-1]


def test_the_schedule_survives_a_reset_and_a_change_of_layers() -> None:
    model = small_net(16)
    model_compiled = compiled(model, "cosine:start=0.1,end=0.9,steps=20")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> int:
        loss(model_compiled(X)).backward()
        optimizer.step()
        return variant(model).scheduler.last_step

    assert step() == 1
    torch._dynamo.reset()
    assert step() == 2
    model[3] = nn.Conv2d(16, 24, 3)
    assert step() == 3
    assert variant(model).keep_counts.shape == (2,)
    assert {site.name: site.channels for site in report(model_compiled).sites} == {"0": 16, "3": 24}


def test_new_options_start_a_new_schedule() -> None:
    model = small_net(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rate, kept in ((0.5, 8), (0.75, 4)):
        optimizer.zero_grad()
        loss(compiled(model, f"constant:rate={rate}", start_step=7)(X)).backward()
        assert kept_rows(model[0].weight) == kept
        assert variant(model).scheduler.last_step == 7
        optimizer.step()


def test_a_step_that_ran_eagerly_warns_and_the_schedule_goes_on() -> None:
    model = small_net(16)
    model_compiled = compiled(model, "constant:rate=0.5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model_compiled(X)).backward()
    optimizer.step()
    with torch.compiler.set_stance("force_eager"):
        loss(model_compiled(X)).backward()
    with pytest.warns(NoEffectWarning, match="no sparse graph ran") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert variant(model).scheduler.last_step == 2


def test_a_schedule_that_stands_still_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepping, "_FORWARDS_PATIENCE", 3)
    model = compiled(small_net(16), "bar:rate=0.5,period=2")
    for _ in range(2):
        model(X)
    with pytest.warns(NoEffectWarning, match=r"stands still at step 0.*no step of a torch\.optim"):
        model(X)
