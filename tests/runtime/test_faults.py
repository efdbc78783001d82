"""Never silently dense: every fault in the list, with every way to compile a model."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from faults import (
    EXCEPTIONS,
    OURS,
    PLACES,
    SITUATIONS,
    SPARSE,
    WARNING,
    WARNING_FIRST,
    WARNING_STAYS,
    WRAPPED,
    Disabled,
    Place,
    Situation,
    TwoGraphs,
    tables,
)
from no_edit import compiled
from sources import ROOT
from ssprop_passes.errors import NoEffectWarning, SsPropCompileError
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile

X = torch.randn(2, 3, 10, 10)
SILENT = "dense, and not a word"
ENTRIES = ("ssprop_compile", "no edit")


class Boom(BaseException):
    """Stands for KeyboardInterrupt, which a test must not raise: nobody may catch it."""


def make(entry: str, model: nn.Module, backend: str = "aot_eager", **options: object) -> nn.Module:
    if entry == "no edit":
        return compiled(model, "constant:rate=0.5", backend=backend, **options)
    config = SparsityConfig(channel_multiple=1, min_channels=1)
    scheduler = SparsityScheduler(constant(0.5))
    if backend == "inductor":
        options = {"options": options}
    return ssprop_compile(model, scheduler, config=config, backend=backend, **options)


def causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def is_named(error: BaseException) -> str:
    """Return what the user sees, in the words of the table."""
    if isinstance(error, SsPropCompileError):
        return OURS
    if isinstance(error, BackendCompilerFailed) and "SsPropCompileError: " in str(error):
        assert isinstance(error.inner_exception, SsPropCompileError)
        return WRAPPED
    return repr(error)


def step(model: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
    model.zero_grad()
    call(X).sum().backward()


CELLS = [
    pytest.param(place, entry, suppress, id=f"{place.text}-{entry}-{suppress}")
    for place in PLACES
    for entry in ENTRIES
    for suppress in (False, True)
    if entry == "no edit" or place.sees
]


def check_cell(errors: Sequence[BaseException], place: Place, entry: str, suppress: bool) -> None:
    """Check what the user sees for these exceptions in one cell of the table."""
    expected = place.sees if entry == "ssprop_compile" else place.sees_no_edit
    if suppress:
        expected = OURS
    raised: list[BaseException] = []

    def fail(*args: object, **kwargs: object) -> None:
        raise raised[-1]

    for error in errors:
        torch._dynamo.reset()
        raised.append(error)
        model = nn.Conv2d(3, 8, 3)
        with (
            pytest.MonkeyPatch.context() as patch,
            torch._dynamo.config.patch(suppress_errors=suppress),
        ):
            place.inject(patch, fail)
            call = make(entry, model, place.backend, **place.options(fail))
            with pytest.raises(BaseException) as caught:  # noqa: PT011, looked at below
                step(model, call)
        if isinstance(error, Boom):
            assert caught.value is error
        else:
            assert is_named(caught.value) == expected, type(error).__name__
            ours = caught.value if expected == OURS else caught.value.inner_exception
            assert error in causes(ours)
        assert all(p.grad is None for p in model.parameters()), "something was trained"


@pytest.mark.parametrize(
    ("number", "cell"),
    [
        # Really compile the forward of the dense form.
        pytest.param(
            number,
            cell,
            id=cell.id,
            marks=[pytest.mark.slow] * ("first `.backward()`-no edit" in cell.id),
        )
        for number, cell in enumerate(CELLS)
    ],
)
def test_an_exception_reaches_the_user(number: int, cell: Any) -> None:
    check_cell([EXCEPTIONS[number % len(EXCEPTIONS)]], *cell.values)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "entry", "suppress"), CELLS)
def test_every_exception_reaches_the_user(place: Place, entry: str, suppress: bool) -> None:
    check_cell([*EXCEPTIONS, Boom()], place, entry, suppress)


def outcomes(situation: Situation, entry: str) -> list[str]:
    """What the user sees in two steps in a situation, in the words of the table."""
    model = situation.model()
    # Static shapes, so that another batch size recompiles.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        call = make(entry, model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step(model, call)
        optimizer.step()
        found = []
        with situation.enter(model):
            for _ in range(2):
                found.append(outcome(model, lambda: call(X[: situation.batch]), optimizer))
    return found


def outcome(
    model: nn.Module, forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer
) -> str:
    model.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            forward().sum().backward()
            optimizer.step()
        except Exception as error:
            return f"torch's `{type(error).__name__}`"
    weights = [p for p in model.parameters() if p.ndim == 4]
    if all((w.grad.flatten(1).abs().sum(1) > 0).sum() == len(w) // 2 for w in weights):
        return SPARSE
    ours = [w for w in caught if issubclass(w.category, NoEffectWarning)]
    return WARNING if ours else SILENT


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.text)
def test_a_dense_step_is_not_silent(situation: Situation, entry: str) -> None:
    expected = situation.sees if entry == "ssprop_compile" else situation.sees_no_edit
    first, second = outcomes(situation, entry)
    if expected == WARNING_FIRST:
        assert first in (WARNING, SPARSE)
        assert second == SPARSE
    elif expected == WARNING_STAYS:
        assert (first, second) in ((WARNING, SILENT), (SPARSE, SPARSE))
    else:
        assert first == expected
        # One warning is enough.
        assert second == (first if first != WARNING else SILENT)


def test_the_tables_of_the_documentation_are_the_lists() -> None:
    page = ROOT / "docs" / "trust.md"
    assert tables() in page.read_text(), "python tests/support/faults.py prints the new tables"


@pytest.mark.parametrize("entry", ENTRIES)
def test_another_dense_step_after_sparse_ones_warns_again(entry: str) -> None:
    model = nn.Conv2d(3, 8, 3)
    call = make(entry, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = []
    for name in ("default", "force_eager", "default", "force_eager", "force_eager"):
        with torch.compiler.set_stance(name):
            found.append(outcome(model, lambda: call(X), optimizer))
    assert found == [SPARSE, WARNING, SPARSE, WARNING, SILENT]


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_warning_does_not_hide_another(entry: str) -> None:
    model = TwoGraphs(Disabled())
    call = make(entry, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def both() -> None:
        call(X).sum().backward()
        optimizer.step()

    with pytest.warns(NoEffectWarning, match=r"1 layer is in no sparse graph.*second\.inner"):
        both()
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(NoEffectWarning, match="no sparse graph ran"),
    ):
        both()


def test_layers_lost_at_the_recompile_limit_are_named() -> None:
    model = TwoGraphs()
    call = make("ssprop_compile", model)
    step(model, call)
    model.mode = "other"
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.warns(NoEffectWarning, match=r"1 layer .* in this step: second\. Either"),
    ):
        step(model, call)


def test_the_warning_points_at_the_line_of_the_user() -> None:
    model = nn.Conv2d(3, 8, 3)
    call = make("ssprop_compile", model)
    with torch.compiler.set_stance("force_eager"), pytest.warns(NoEffectWarning) as caught:
        call(X)
    assert caught[0].filename == __file__


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return nn.functional.interpolate(self.layer(x), scale_factor=scale)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_python_number_that_cannot_be_a_tensor_is_no_failure(entry: str) -> None:
    """Dynamo gets the request to trace again, not the user."""
    model = Scaled()
    call = make(entry, model)
    for scale in (1.5, 2.5, 3.5):
        step(model, lambda x, scale=scale: call(x, scale))
        assert (model.layer.weight.grad.flatten(1).abs().sum(1) > 0).sum() == 4
