"""What can go wrong between the user and a sparse step, and what the user then sees.

The tests of faults run every entry of these lists. The tables of docs/trust.md are generated from
them: `python tests/support/faults.py` prints the tables.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch._dynamo.exc import SkipFrame, Unsupported, UserError, UserErrorType
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedMutationAliasingException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils.flop_counter import FlopCounterMode

OPERATOR = torch.ops.aten.nonzero.default

# Some make Dynamo run eagerly, some start a new attempt, some are an error anyway.
EXCEPTIONS: tuple[Exception, ...] = (
    DataDependentOutputException(OPERATOR),
    DynamicOutputShapeException(OPERATOR),
    UnsupportedOperatorException(OPERATOR),
    UnsupportedFakeTensorException("boom"),
    UnsupportedMutationAliasingException("boom"),
    GuardOnDataDependentSymNode(sympy.Symbol("u0"), "boom"),
    SkipFrame("boom"),
    Unsupported("boom", gb_type="boom"),
    UserError(UserErrorType.ANTI_PATTERN, "boom"),
    IndexError("boom"),
    AssertionError("boom"),
    NotImplementedError("boom"),
    RuntimeError("boom"),
)

OURS = "`SsPropCompileError`"
WRAPPED = "`BackendCompilerFailed` that names `SsPropCompileError`"
WARNING = "`NoEffectWarning`"
# Which of the two depends on what torch has seen of the same code before.
WARNING_FIRST = "`NoEffectWarning` or sparse, then sparse"
# Torch still uses code that it has already compiled with AOT eager, and dense.
WARNING_STAYS = "`NoEffectWarning` or sparse"
SPARSE = "sparse"

Fail = Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """A place from which an exception can come.

    Attributes:
        text: its name in the table.
        inject: puts a function that raises in this place.
        backend: `"inductor"` or `"aot_eager"`.
        sees: what the user of `ssprop_compile` sees; empty if `ssprop_compile` does not use it.
        sees_no_edit: what the user of `torch.compile(backend="ssprop")` sees.
        options: makes Inductor's options.
    """

    text: str
    inject: Callable[[pytest.MonkeyPatch, Fail], None]
    backend: str = "aot_eager"
    sees: str = OURS
    sees_no_edit: str = WRAPPED
    options: Callable[[Fail], dict[str, Any]] = field(default=lambda fail: {})


def replace(target: str) -> Callable[[pytest.MonkeyPatch, Fail], None]:
    return lambda patch, fail: patch.setattr(target, fail)


def fail_in_inner_compile(is_backward: bool) -> Callable[[pytest.MonkeyPatch, Fail], None]:
    """Let Inductor run the graph as it is, or fail, instead of generating code."""

    def inject(patch: pytest.MonkeyPatch, fail: Fail) -> None:
        def inner(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            return fail() if kwargs.get("is_backward", False) == is_backward else boxed(gm)

        patch.setattr(compile_fx, "compile_fx_inner", inner)

    return inject


def boxed(gm: torch.fx.GraphModule) -> Any:
    return make_boxed_func(gm.forward)


PLACES = (
    Place(
        "the pass, under AOT eager",
        replace("ssprop_passes.transforms.sparse_backward.find_state_inputs"),
    ),
    Place(
        "the pass, under Inductor",
        replace("ssprop_passes.transforms.sparse_backward.find_state_inputs"),
        "inductor",
    ),
    Place(
        "a pass of the user's own that runs before it",
        lambda patch, fail: None,
        "inductor",
        options=lambda fail: {"joint_custom_pre_pass": fail},
    ),
    Place("the backend, before it compiles", replace("ssprop_fx.compiler.backend.mark_layers")),
    Place("AOTAutograd", replace("ssprop_fx.compiler.inductor.lookup_backend")),
    Place("Inductor's compile of the forward", fail_in_inner_compile(False), "inductor"),
    Place(
        "Inductor's compile of the backward, at the first `.backward()`",
        fail_in_inner_compile(True),
        "inductor",
        sees_no_edit=OURS,
    ),
    Place(
        "the dense form of the graph",
        replace("ssprop_fx.named_backend.plugin.lookup_backend"),
        sees="",
    ),
)


class TwoGraphs(nn.Module):
    """Two graphs; the second one also depends on `mode`."""

    mode = "plain"

    def __init__(self, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = second or nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x).relu() if self.mode == "plain" else self.second(x).tanh()


class Disabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 3)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@dataclass(frozen=True)
class Situation:
    """A situation that keeps Dynamo from running the sparse graph, without an exception of ours.

    Attributes:
        text: its name in the table.
        enter: a context that creates it, for a model that has already made a sparse step.
        sees: what the user of `ssprop_compile` sees in the next two steps.
        sees_no_edit: what the user of `torch.compile(backend="ssprop")` sees.
        batch: batch size of these two steps; the step before has 2.
        model: makes the model.
    """

    text: str
    enter: Callable[[nn.Module], AbstractContextManager[Any]]
    sees: str = WARNING
    sees_no_edit: str = WARNING
    batch: int = 1
    model: Callable[[], nn.Module] = lambda: nn.Conv2d(3, 8, 3)


def dynamo(**config: Any) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    return lambda model: torch._dynamo.config.patch(**config)


def stance(name: str, **options: Any) -> Callable[[nn.Module], AbstractContextManager[Any]]:
    return lambda model: torch.compiler.set_stance(name, **options)


@contextmanager
def another_mode_at_the_limit(model: TwoGraphs) -> Iterator[None]:
    model.mode = "other"
    with torch._dynamo.config.patch(recompile_limit=1):
        yield


@contextmanager
def no_guards(suppress: bool) -> Iterator[None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.convert_frame.DynamoOutput, "build_guards", fail)
        with torch._dynamo.config.patch(suppress_errors=suppress):
            yield


SITUATIONS = (
    Situation("`recompile_limit` reached", dynamo(recompile_limit=1)),
    Situation("`accumulated_recompile_limit` reached", dynamo(accumulated_recompile_limit=1)),
    Situation(
        "`recompile_limit` reached behind a graph break, by a part of the model",
        another_mode_at_the_limit,
        batch=2,
        model=TwoGraphs,
    ),
    Situation(
        "`fail_on_recompile_limit_hit`",
        dynamo(recompile_limit=1, fail_on_recompile_limit_hit=True),
        "torch's `FailOnRecompileLimitHit`",
        "torch's `FailOnRecompileLimitHit`",
    ),
    Situation("`torch._dynamo.config.disable`", dynamo(disable=True)),
    Situation(
        "a failure of Dynamo's own",
        lambda model: no_guards(suppress=False),
        "torch's `InternalTorchDynamoError`",
        "torch's `InternalTorchDynamoError`",
    ),
    Situation("the same with `suppress_errors`", lambda model: no_guards(suppress=True)),
    Situation("a dispatch mode", lambda model: FlopCounterMode(display=False), batch=2),
    Situation('stance `"force_eager"`', stance("force_eager"), batch=2),
    Situation('stance `"eager_on_recompile"`', stance("eager_on_recompile")),
    Situation(
        'stance `"fail_on_recompile"`',
        stance("fail_on_recompile"),
        "torch's `RuntimeError`",
        "torch's `RuntimeError`",
    ),
    Situation(
        'stance `"eager_then_compile"`',
        stance("eager_then_compile"),
        WARNING_FIRST,
        WARNING_FIRST,
    ),
    Situation(
        'stance `"aot_eager_then_compile"`',
        stance("aot_eager_then_compile"),
        WARNING_STAYS,
        WARNING_STAYS,
    ),
    Situation(
        "a stance with `force_backend`", stance("default", force_backend="eager"), WARNING, WARNING
    ),
    Situation(
        "a stance with `skip_guard_eval_unsafe`",
        stance("default", skip_guard_eval_unsafe=True),
        SPARSE,
        SPARSE,
        batch=2,
    ),
)


def tables() -> str:
    """Return the tables of docs/trust.md."""
    lines = [
        *(f"- `{type(error).__name__}`" for error in EXCEPTIONS),
        "",
        '| raised in | `ssprop_compile` | `torch.compile(backend="ssprop")` | the same with'
        " `suppress_errors` |",
        "|---|---|---|---|",
    ]
    lines += [f"| {p.text} | {p.sees or '-'} | {p.sees_no_edit} | {OURS} |" for p in PLACES]
    lines += [
        "",
        '| what happens | `ssprop_compile` | `torch.compile(backend="ssprop")` |',
        "|---|---|---|",
        *(f"| {s.text} | {s.sees} | {s.sees_no_edit} |" for s in SITUATIONS),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
