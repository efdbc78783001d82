"""Features of torch's compiler, and what they do under sparse back-propagation.

The tests of features run every entry. A table of docs/trust.md is generated from them:
`python tests/support/features.py` prints it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

RIGHT = "the gradients of the oracle"

# Compiles a model for sparse training, in one of the two ways.
Make = Callable[..., Callable[..., Tensor]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).tanh()


class Net(nn.Module):
    """A stem and blocks, each called through `call`."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        # Not a loop: Dynamo runs a whole loop eagerly if it has a graph break.
        first, second, third = self.blocks
        call = self.call or (lambda block, x: block(x))
        return call(third, call(second, call(first, self.stem(x))))


@dataclass(frozen=True)
class Feature:
    """A feature of torch's compiler.

    Attributes:
        text: its name in the table.
        compile: makes a model callable with the feature in use; may change blocks in place.
        sees: the result with `ssprop_compile`.
        sees_no_edit: the result with `torch.compile(backend="ssprop")`; empty if it is the same.
        call: how the model calls its blocks.
        context: the context of forward and backward.
        dense: names of the layers that stay dense.
        match: a pattern that the error or warning matches.
    """

    text: str
    compile: Callable[[Make, nn.Module], Callable[..., Tensor]] = lambda make, model: make(model)
    sees: str = RIGHT
    sees_no_edit: str = ""
    call: Callable[[nn.Module, Tensor], Tensor] | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    dense: tuple[str, ...] = ()
    match: str = ""


def save_convolutions(_context: object, op: object, *_args: object, **_kwargs: object) -> object:
    is_convolution = op is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if is_convolution else CheckpointPolicy.PREFER_RECOMPUTE


def selectively(block: nn.Module, x: Tensor) -> Tensor:
    context = partial(create_selective_checkpoint_contexts, save_convolutions)
    return checkpoint(block, x, use_reentrant=False, context_fn=context)


def each_block(make: Make, model: nn.Module) -> nn.Module:
    """Regional compilation: only the blocks, in a loop."""
    for number, block in enumerate(model.blocks):
        model.blocks[number] = make(block)
    return model


def one_block_by_torch(make: Make, model: nn.Module) -> Callable[..., Tensor]:
    model.blocks[1] = torch.compile(model.blocks[1], backend="aot_eager")
    return make(model)


def one_block_in_place(make: Make, model: nn.Module) -> Callable[..., Tensor]:
    model.blocks[1].compile(backend="aot_eager")
    return make(model)


def inside_another(make: Make, model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    inner = make(model)
    return torch.compile(lambda x: inner(x) * 1, backend="aot_eager", **options)


@torch.compiler.nested_compile_region
def nested_region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


@torch.compiler.disable
def disabled(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


COMPILED_AUTOGRAD = partial(torch._dynamo.config.patch, compiled_autograd=True)
INLINED = partial(torch._dynamo.config.patch, inline_invoke_subgraph=True)
NO_EFFECT = "`NoEffectWarning` that names these layers; the others are sparse"

FEATURES = (
    Feature("`fullgraph=True`", lambda make, model: make(model, fullgraph=True)),
    Feature("`dynamic=True`", lambda make, model: make(model, dynamic=True)),
    Feature("`dynamic=False`", lambda make, model: make(model, dynamic=False)),
    Feature("compiled autograd", context=COMPILED_AUTOGRAD),
    Feature(
        "activation checkpointing, not reentrant",
        call=lambda block, x: checkpoint(block, x, use_reentrant=False),
    ),
    Feature(
        "activation checkpointing, reentrant",
        call=lambda block, x: checkpoint(block, x, use_reentrant=True),
    ),
    Feature("selective activation checkpointing", call=selectively),
    Feature(
        "regional compilation: blocks compiled in a loop, the rest eager",
        each_block,
        dense=("stem",),
    ),
    Feature("a block compiled by `torch.compile` already", one_block_by_torch),
    Feature("a block compiled in place, `block.compile()`", one_block_in_place),
    Feature(
        "the compiled model inside another `torch.compile`",
        inside_another,
        sees_no_edit="dense: the outer backend compiles it; `NoEffectWarning` after 10 optimizer"
        " steps",
        dense=(),
    ),
    Feature(
        "the same with `fullgraph=True`",
        partial(inside_another, fullgraph=True),
        "torch's `Unsupported`, which says that the model is already compiled",
        sees_no_edit="as without `fullgraph=True`",
        match="ssprop_compile has compiled it already",
    ),
    Feature(
        "`torch.compiler.nested_compile_region`",
        sees="`SsPropCompileError`",
        sees_no_edit="`BackendCompilerFailed` that names `SsPropCompileError`",
        call=nested_region,
        match="inline_invoke_subgraph = True",
    ),
    Feature(
        "the same with `torch._dynamo.config.inline_invoke_subgraph` (torch 2.12 and newer)",
        call=nested_region,
        context=INLINED,
    ),
    Feature(
        "blocks under `torch.compiler.disable`",
        sees=NO_EFFECT,
        call=disabled,
        dense=("blocks.0.conv", "blocks.1.conv", "blocks.2.conv"),
        match=r"3 layers are in no sparse graph.*blocks\.0\.conv, blocks\.1\.conv, blocks\.2\.conv",
    ),
)


def table() -> str:
    """Return the table of docs/trust.md."""
    lines = ['| feature | `ssprop_compile` | `torch.compile(backend="ssprop")` |', "|---|---|---|"]
    lines += [f"| {f.text} | {f.sees} | {f.sees_no_edit or f.sees} |" for f in FEATURES]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
