"""Sites: the backward nodes that can be made sparse, and why the others are not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

__all__ = [
    "MIN_KEEP_COUNT",
    "SITE_KEY",
    "ConvBackward",
    "Site",
    "Slot",
    "backward_flops",
    "match_conv_backward",
    "site_name",
    "why_dense",
]

aten = torch.ops.aten

# Up to torch 2.11 the fake kernel of a convolution with an unbacked size guards on `u0 > 1`, so
# a keep count of 1 cannot be compiled there.
MIN_KEEP_COUNT = 1 if torch.__version__ >= torch.torch_version.TorchVersion("2.12") else 2

# Key in `node.meta["custom"]`, which AOTAutograd copies from a forward node to its backward
# nodes, of the name of the layer that the node belongs to.
SITE_KEY = "ssprop_layer"


@dataclass(frozen=True)
class Slot:
    """A layer's place in the runtime sparsity tensor.

    Attributes:
        index: position in the model's part of the tensor.
        name: the layer's name, as in `model.named_modules()`.
        channels: its output channels.
    """

    index: int
    name: str
    channels: int


@dataclass(frozen=True)
class Site:
    """What became of one backward node.

    Attributes:
        name: the layer's name, "" where the node belongs to none.
        kind: such as `conv2d`.
        channels: output channels, C.
        flops: floating-point operations of the dense backward node.
        slot: index in the runtime sparsity tensor, -1 for a site left dense.
        reason: why it was left dense, "" for a sparse one.
    """

    name: str
    kind: str
    channels: int
    flops: int
    slot: int = -1
    reason: str = ""


@dataclass(frozen=True)
class ConvBackward:
    """The arguments of an `aten.convolution_backward` node.

    Attributes:
        grad_output, input, weight: nodes of the three tensors.
        geometry: stride, padding, dilation, transposed, output_padding, groups.
        output_mask: which of the gradients of input, weight and bias are wanted.
    """

    grad_output: fx.Node
    input: fx.Node
    weight: fx.Node
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    output_mask: tuple[bool, bool, bool]

    @property
    def kind(self) -> str:
        """Such as `conv2d` or `conv_transpose1d`."""
        transpose = "_transpose" if self.transposed else ""
        return f"conv{transpose}{self.weight.meta['val'].ndim - 2}d"


def match_conv_backward(node: fx.Node) -> ConvBackward | None:
    """Return the arguments of an `aten.convolution_backward` node, None for any other node."""
    if node.op != "call_function" or node.target is not aten.convolution_backward.default:
        return None
    (grad_output, input_, weight, _bias_sizes, stride, padding, dilation) = node.args[:7]
    transposed, output_padding, groups, output_mask = node.args[7:]
    return ConvBackward(
        grad_output,
        input_,
        weight,
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        transposed,
        tuple(output_padding),
        groups,
        tuple(output_mask),
    )


def site_name(node: fx.Node) -> str | None:
    """Return the name of the layer that a node belongs to, None where it was not marked."""
    return (node.meta.get("custom") or {}).get(SITE_KEY)


def why_dense(
    conv: ConvBackward, name: str | None, slots: Mapping[str, Slot], excluded: Mapping[str, str]
) -> str:
    """Return why a convolution's backward cannot be made sparse, "" if it can.

    Args:
        conv: the node's arguments.
        name: the layer's name.
        slots: the layers that take part, by name.
        excluded: the layers that do not, by name, with the reason.
    """
    if conv.transposed:
        return "transposed convolution"
    if conv.weight.meta["val"].ndim != 4:
        return "not a 2-D convolution"
    if conv.groups != 1:
        return "grouped convolution"
    if name is None:
        return "outside the model's modules"
    if name in excluded:
        return excluded[name]
    if name not in slots:
        return "its module owns no convolution weight"
    if slots[name].channels != conv.weight.meta["val"].shape[0]:
        return "its weight is not that of its module"
    return ""


def backward_flops(node: fx.Node) -> int:
    """Return the floating-point operations of a convolution or matrix product node, else 0.

    Formulas are those of `torch.utils.flop_counter`: two operations a multiply-add. Symbolic
    sizes count at their hint.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in flop_registry:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), _with_hinted_shape)
    val = node.meta["val"]
    out = _hinted(val) if isinstance(val, torch.Tensor) else tuple(map(_hinted, val))
    return int(flop_registry[packet](*args, **kwargs, out_val=out))


def _with_hinted_shape(node: fx.Node) -> Any:
    return _hinted(node.meta["val"])


def _hinted(val: Any) -> Any:
    """Return a meta tensor with plain int sizes in place of a fake tensor, others unchanged."""
    if not isinstance(val, torch.Tensor):
        return val
    sizes = [s if isinstance(s, int) else s.node.hint for s in val.shape]
    return torch.empty(sizes, device="meta", dtype=val.dtype)
