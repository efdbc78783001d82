"""The small grid's model: a residual network for 32x32 pixels that trains in half a minute."""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

__all__ = ["StudyResNet", "study_resnet"]


class StudyResNet(nn.Module):
    """Three stages with one basic residual block each, at 8x8, 4x4 and 2x2 for images of 32x32.

    Args:
        width: channels of the first stage; the others have two and four times as many.
        num_classes: number of outputs.
        in_chans: channels of the images.
        drop_rate: dropout between the two convolutions of each block, as in wide ResNets, and
            before the classifier.
    """

    def __init__(
        self, width: int = 32, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 4 * width
        self.stem = _convolution(in_chans, width, stride=2)
        self.layer1 = _Block(width, width, 2, drop_rate)
        self.layer2 = _Block(width, 2 * width, 2, drop_rate)
        self.layer3 = _Block(2 * width, 4 * width, 2, drop_rate)
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(4 * width, num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the classifier, which timm and ssprop_fx need."""
        return self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [N, num_classes] of images [N, in_chans, H, W]."""
        features = self.layer3(self.layer2(self.layer1(self.stem(images).relu())))
        logits: torch.Tensor = self.fc(self.dropout(features.mean((2, 3))))
        return logits


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, stride)
        self.dropout = nn.Dropout(drop_rate)
        self.conv2 = _convolution(outputs, outputs)
        self.shortcut = _convolution(inputs, outputs, stride, size=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.conv2(self.dropout(self.conv1(inputs).relu()))
        return (features + self.shortcut(inputs)).relu()


def _convolution(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


# `register_model` needs this name.
default_cfgs = generate_default_cfgs(
    {
        "study_resnet.untrained": {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": (0.49, 0.48, 0.45),
            "std": (0.25, 0.24, 0.26),
            "first_conv": "stem.0",
            "classifier": "fc",
        }
    }
)


@register_model
def study_resnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return a StudyResNet; importing this module makes its name known to timm."""
    model: nn.Module = build_model_with_cfg(StudyResNet, "study_resnet", pretrained, **kwargs)
    return model
