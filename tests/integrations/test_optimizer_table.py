"""Every optimizer of timm that runs on a CPU: docs/optimizers.md, and freeze_dropped."""

import pytest
import timm
import torch
from optimizers import GPU, HERE, check_freeze, model, runs, table
from sources import ROOT
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from ssprop_fx import freeze_dropped

PAGE = (ROOT / "docs" / "optimizers.md").read_text()


@pytest.mark.parametrize("name", list_optimizers())
def test_freeze_dropped_holds(name: str) -> None:
    if (why_not := runs(name)) != HERE:
        assert why_not in PAGE
        pytest.skip(why_not)
    check_freeze(name)


def test_the_table_of_the_documentation_is_what_they_do() -> None:
    if f"timm {timm.__version__}" not in PAGE:
        pytest.skip("the table is of another release of timm")
    assert table() in PAGE, "python tests/support/optimizers.py prints the new table"
    assert sum(runs(name) == GPU for name in list_optimizers()) > 0


def test_optimizers_for_which_it_cannot_hold_are_refused_by_name() -> None:
    weights = list(model().parameters())
    lookahead = create_optimizer_v2(weights, opt="lookahead_adamw", lr=0.1)
    with pytest.raises(TypeError, match=r"^optimizer must run .* but Lookahead does not"):
        freeze_dropped(lookahead, model())
    with pytest.raises(TypeError, match=r"^optimizer must take one gradient a step, but LBFGS"):
        freeze_dropped(torch.optim.LBFGS(weights), model())


def test_a_step_with_a_closure_freezes_what_the_closure_dropped() -> None:
    """Lightning always steps with a closure, which computes the gradients."""
    layer: nn.Linear = model()._orig_mod
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    handle = freeze_dropped(optimizer, model())

    def closure(dropped: slice) -> float:
        optimizer.zero_grad()
        layer.weight.grad = torch.randn_like(layer.weight)
        layer.weight.grad[dropped] = 0
        return 1.5

    for dropped, how in ((slice(0, 30), "keyword"), (slice(10, 40), "position")):
        before = layer.weight.detach().clone()
        arguments = ([lambda d=dropped: closure(d)], {})
        if how == "keyword":
            arguments = ([], {"closure": lambda d=dropped: closure(d)})
        assert optimizer.step(*arguments[0], **arguments[1]) == 1.5
        moved = (layer.weight.detach() != before).any(1)
        assert not moved[dropped].any()
        assert int(moved.sum()) == 10
    handle.remove()
