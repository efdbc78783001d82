"""With a graph break in a block, the graph of one block serves all blocks of its kind."""

import gc
import warnings
import weakref

import pytest
import torch
from blocks import Block
from oracle import gradients, oracle_gradients, relative_error
from ssprop_passes.errors import NoEffectWarning
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile


def loss(output: Tensor) -> Tensor:
    return output.sin().sum()


def compare(dense_layer: str) -> tuple[float, dict[str, str]]:
    """Return the error of four blocks with one dense layer, and why each site is dense."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(*[Block(32) for _ in range(4)]).double()
    x = torch.randn(4, 32, dtype=torch.float64)

    def takes_part(_module: nn.Module, name: str) -> bool:
        return name != dense_layer

    expected = oracle_gradients(model, x, 0.5, takes_part, loss)
    config = SparsityConfig(channel_multiple=1, filter_fn=takes_part)
    scheduler = SparsityScheduler(constant(0.5))
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    loss(compiled(x.requires_grad_())).backward()
    error = relative_error(gradients(model, x), expected)
    return error, {site.name: site.reason for site in report(compiled).sites}


def test_every_block_has_its_own_keep_counts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        error, reasons = compare(dense_layer="2.first")
    assert error < 1e-10
    assert reasons.pop("2.first") == "filtered out by filter_fn"
    assert reasons == dict.fromkeys(
        (f"{i}.{n}" for i in range(4) for n in ("first", "second") if (i, n) != (2, "first")), ""
    )


def test_blocks_that_run_the_code_of_a_dense_one_are_named() -> None:
    with pytest.warns(NoEffectWarning, match=r"and so dense: 1\.second, 2\.second, 3\.second"):
        _, reasons = compare(dense_layer="0.second")
    assert "compiled code of '0.second'" in reasons["3.second"]
    assert reasons["3.first"] == ""


def test_a_block_of_other_rates_follows_the_scheduler() -> None:
    """Keep counts are read at each call, not when a block is first met."""
    torch._dynamo.reset()
    model = nn.Sequential(*[Block(32) for _ in range(3)])
    scheduler = SparsityScheduler(lambda step: (0.25, 0.75)[step])
    config = SparsityConfig(channel_multiple=1)
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    for kept in (24, 8):
        model.zero_grad()
        loss(compiled(torch.randn(4, 32))).backward()
        for block in model:
            rows = block.second.weight.grad.abs().sum(1)
            assert (rows > 0).sum() == kept
        if kept == 24:
            scheduler.step()


def test_parameters_that_were_replaced_are_found() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    scheduler = SparsityScheduler(constant(0.75))
    config = SparsityConfig(channel_multiple=1)
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    for _ in range(2):
        loss(compiled(torch.randn(4, 32))).backward()
        assert (model[0].weight.grad.abs().sum(1) > 0).sum() == 8
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        model.requires_grad_()


def test_compiled_code_does_not_keep_the_model_alive() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    compiled = ssprop_compile(model, SparsityScheduler(constant(0.5)), backend="aot_eager")
    loss(compiled(torch.randn(4, 32))).backward()
    alive = weakref.ref(model)
    del model, compiled
    gc.collect()
    assert alive() is None
