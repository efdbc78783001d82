"""Single layers to measure: typical ones, or the layers of a timm model."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import timm
import torch
from torch import Tensor, nn

__all__ = ["TYPICAL", "Layer", "collect_layers"]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer and the shape of its input.

    Attributes:
        name: name in its row.
        input_shape: without the batch, [C_in, *space] or [..., C_in].
        channels: output channels, C.
        kernel: one entry per spatial dimension; empty for a linear layer.
        stride, padding, dilation: likewise.
        groups: groups of a convolution.
        calls: how often its model calls a layer of this shape.
    """

    name: str
    input_shape: tuple[int, ...]
    channels: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    calls: int = 1

    @property
    def shape(self) -> str:
        """A text such as `64-256 3x3/2 at 56x56`; names dilation and groups above 1."""
        if not self.kernel:
            rows = "x".join(map(str, self.input_shape[:-1]))
            return f"{self.input_shape[-1]}-{self.channels}" + (f" at {rows}" if rows else "")
        kernel, space = ("x".join(map(str, sizes)) for sizes in (self.kernel, self.input_shape[1:]))
        stride = f"/{max(self.stride)}" if max(self.stride) > 1 else ""
        dilation = f" dilation {max(self.dilation)}" if max(self.dilation) > 1 else ""
        groups = f" groups {self.groups}" if self.groups > 1 else ""
        channels = f"{self.input_shape[0]}-{self.channels}"
        return f"{channels} {kernel}{stride}{dilation}{groups} at {space}"

    def build(self) -> nn.Module:
        """Return the layer, without bias."""
        if not self.kernel:
            return nn.Linear(self.input_shape[-1], self.channels, bias=False)
        geometry = (self.kernel, self.stride, self.padding, self.dilation)
        conv = _CONVS[len(self.kernel) - 1]
        return conv(self.input_shape[0], self.channels, *geometry, self.groups, bias=False)


def _conv(
    name: str, inputs: int, channels: int, size: int, kernel: int, stride: int = 1, groups: int = 1
) -> Layer:
    pair = (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1)
    return Layer(name, (inputs, size, size), channels, *pair, groups)


# At a resolution of 224 pixels.
TYPICAL = (
    _conv("resnet50 3x3 early", 64, 64, 56, 3),
    _conv("resnet50 1x1 widening", 64, 256, 56, 1),
    _conv("resnet50 1x1 narrowing", 256, 64, 56, 1),
    _conv("resnet50 3x3 late", 256, 256, 14, 3),
    _conv("resnet50 1x1 late", 1024, 256, 14, 1),
    _conv("resnet50 3x3 strided", 512, 512, 14, 3, stride=2),
    _conv("vgg16 3x3 early", 64, 64, 224, 3),
    _conv("vgg16 3x3 late", 512, 512, 28, 3),
    _conv("mobilenetv2 1x1", 24, 144, 56, 1),
    _conv("mobilenetv2 depthwise", 144, 144, 56, 3, groups=144),
    _conv("regnety_008 grouped", 320, 320, 14, 3, groups=20),
    _conv("convnext_atto depthwise", 80, 80, 28, 7, groups=80),
    Layer("convnext_tiny linear", (56, 56, 96), 384),
    Layer("vit_small linear", (197, 384), 1536),
)


def collect_layers(model: str, img_size: int) -> list[Layer]:
    """Return the layers of a timm model, each shape once, without computing anything.

    Convolutions whose padding depends on the input count as if they had none. Transposed
    convolutions, and linear layers that the model does not call as modules, are left out.

    Args:
        model: name of the timm model.
        img_size: height and width of its input, in pixels.

    Returns:
        The layers in the order of their first call, each named after the module of that call.

    Example:
        >>> stem, *_, classifier = collect_layers("test_resnet", 32)
        >>> stem.name, stem.input_shape, stem.channels, stem.kernel, stem.stride
        ('test_resnet conv1.0', (3, 32, 32), 16, (3, 3), (2, 2))
        >>> classifier.name, classifier.input_shape, classifier.channels
        ('test_resnet fc', (96,), 1000)
    """
    layers: dict[Layer, str] = {}
    calls: Counter[Layer] = Counter()

    def hook(name: str) -> Callable[[nn.Module, Sequence[Tensor], Tensor], None]:
        def note(module: nn.Module, args: Sequence[Tensor], _output: Tensor) -> None:
            layer = _layer(module, tuple(args[0].shape[1:]))
            layers.setdefault(layer, name)
            calls[layer] += 1

        return note

    with torch.device("meta"):
        net = timm.create_model(model).eval()
        for name, module in net.named_modules():
            if isinstance(module, (*_CONVS, nn.Linear)):
                module.register_forward_hook(hook(name))
        net(torch.empty(1, 3, img_size, img_size))
    return [
        replace(layer, name=f"{model} {name}", calls=calls[layer]) for layer, name in layers.items()
    ]


def _layer(module: nn.Module, input_shape: tuple[int, ...]) -> Layer:
    if isinstance(module, nn.Linear):
        return Layer("", input_shape, module.out_features)
    padding = (0,) * len(module.kernel_size) if isinstance(module.padding, str) else module.padding
    geometry = (module.kernel_size, module.stride, padding, module.dilation)
    return Layer("", input_shape, module.out_channels, *geometry, module.groups)
