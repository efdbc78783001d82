"""The backward of a single layer: whole under both compilers, and part by part."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ssprop_passes.kernels.operators import reduced_conv_backward
from ssprop_passes.replacements.conv import ConvGeometry, sparse_conv_backward
from ssprop_passes.replacements.linear import sparse_linear_backward
from ssprop_passes.selection.gather_scatter import gather_channels, gather_weight, scatter_rows
from ssprop_passes.selection.policy import Selection
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.layers import Layer

__all__ = ["PARTS", "Setting", "WholeBackward", "make_parts"]

PARTS = ("reduced", "score", "select", "gather", "scatter")


@dataclass(frozen=True)
class Setting:
    """How to run a layer.

    Attributes:
        batch_size: number of samples.
        dtype: dtype of its tensors.
        contiguous: use contiguous memory layout instead of channels_last.
        device: device to run on.
        backend: backend of `torch.compile`.
    """

    batch_size: int
    dtype: torch.dtype = torch.float32
    contiguous: bool = False
    device: str = "cpu"
    backend: str = "inductor"

    def build(self, layer: Layer) -> tuple[nn.Module, Tensor]:
        """Return the layer, and an input [N, *input_shape] that requires a gradient."""
        torch.manual_seed(0)
        input = torch.randn(self.batch_size, *layer.input_shape)
        module = layer.build()
        if len(layer.kernel) == 2 and not self.contiguous:
            input = input.to(memory_format=torch.channels_last)
            module = module.to(memory_format=torch.channels_last)
        input = input.to(self.device, self.dtype)
        return module.to(self.device, self.dtype), input.requires_grad_()


@dataclass
class WholeBackward:
    """The backward of a compiled layer; the forward runs in `prepare`.

    Attributes:
        compiled: the compiled layer.
        input: [N, *input_shape].
        grad_output: [N, *output_shape].
    """

    compiled: nn.Module
    input: Tensor
    grad_output: Tensor

    def prepare(self) -> None:
        """Clear the gradients of the last run, and run the forward."""
        self.compiled.zero_grad()
        self.input.grad = None
        self.output = self.compiled(self.input)

    def run(self) -> None:
        """Run the backward."""
        self.output.backward(self.grad_output)


def make_parts(
    module: nn.Module, input: Tensor, grad_output: Tensor, k: int, backend: str
) -> dict[str, Callable[[], object]]:
    """Return functions that each run one part of a layer's sparse backward.

    Args:
        module: the layer, a convolution or `nn.Linear`.
        input: [N, C_in, *space] or [..., C_in].
        grad_output: [N, C, *out_space] or [..., C].
        k: keep count of each group.
        backend: backend of `torch.compile`.

    Returns:
        Name in `PARTS` -> function.
    """
    input, weight, mask, groups = input.detach(), module.weight.detach(), (True, True, False), 1
    backward: Callable[[], object]
    if isinstance(module, nn.Linear):
        input, grad_output = input.flatten(0, -2), grad_output.flatten(0, -2)
        backward = partial(sparse_linear_backward, grad_output, input, weight, k, mask)
    else:
        unpadded = (0,) * len(module.stride)
        geometry = ConvGeometry(
            module.stride, module.padding, module.dilation, False, unpadded, module.groups
        )
        groups = geometry.selection_groups(weight)
        backward = partial(sparse_conv_backward, grad_output, input, weight, k, geometry, mask)
    # The operands of the reduced operation depend on the kind of layer, so record them in a run.
    with _ReducedCalls() as recorder:
        backward()
    selection = Selection()
    scores = selection.score(grad_output, weight)
    indices, _ = selection.choose(scores, k, groups)
    rows = gather_weight(weight, indices)

    def gather(grad_output: Tensor, weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return gather_channels(grad_output, indices), gather_weight(weight, indices)

    def compiled(function: Callable[..., object], *args: object) -> Callable[[], object]:
        return partial(torch.compile(function, backend=backend, dynamic=False), *args)

    return {
        "reduced": recorder.replay,
        "score": compiled(selection.score, grad_output, weight),
        "select": compiled(selection.choose, scores, k, groups),
        "gather": compiled(gather, grad_output, weight, indices),
        "scatter": compiled(scatter_rows, rows, indices, weight),
    }


class _ReducedCalls(TorchDispatchMode):
    """Records the calls of the reduced operation, with their operands."""

    operators = (reduced_conv_backward, torch.ops.aten.mm.default)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func in self.operators:
            self.calls.append(partial(func, *args, **kwargs))
        return func(*args, **kwargs)

    def replay(self) -> None:
        for call in self.calls:
            call()
