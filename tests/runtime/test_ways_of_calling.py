"""Every way to compile a model, in every situation: right and sparse, or a line that says why."""

import copy
import warnings

import pytest
import torch
from calls import EVAL, NOTHING, RATE, SITUATIONS, SPARSE, WAYS, Net, Situation, table
from no_edit import everywhere, loss
from oracle import gradients, oracle_gradients, relative_error
from sources import ROOT
from ssprop_passes.errors import NoEffectWarning


def outcome(way: str, situation: Situation) -> str:
    """What the user sees in two steps, in the words of the table."""
    model = Net().double()
    situation.prepare(model)
    plain = copy.deepcopy(model)
    compiled = situation.compile(WAYS[way], model)
    call = situation.call(compiled)
    x = torch.randn(4, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        situation.before(model, call, x)
        for _ in range(2):
            model.zero_grad()
            output = call(x)
            if output.requires_grad:
                loss(output).backward()
            optimizer.step()
    ours = [w for w in caught if issubclass(w.category, NoEffectWarning)]
    found = gradients(model, x)
    if not found:
        assert not ours, ours[0].message
        return NOTHING
    rate = 0.0 if ours else RATE
    expected = oracle_gradients(plain, x, rate, everywhere, loss)
    assert relative_error(found, {name: expected[name] for name in found}) < 1e-10
    of_all = {name for name, p in plain.named_parameters() if not name.startswith(situation.frozen)}
    assert set(found) == of_all
    if not ours:
        return SPARSE
    (warning,) = ours
    assert str(warning.message).startswith(
        "the model is in eval() mode, so this backward was dense"
    )
    return EVAL


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.text)
def test_a_step_is_sparse_and_right_or_says_why_not(situation: Situation, way: str) -> None:
    assert outcome(way, situation) == situation.sees


def test_the_table_of_the_documentation_is_the_list() -> None:
    page = ROOT / "docs" / "trust.md"
    assert table() in page.read_text(), "python tests/support/calls.py prints the new table"
