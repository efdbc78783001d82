"""SparsityConfig: what takes part in sparse back-propagation, and in what granularity."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

__all__ = ["DEFAULT_TARGETS", "TARGETS", "SparsityConfig"]

TARGETS = ("conv", "depthwise", "linear")
DEFAULT_TARGETS = ("conv", "linear")


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Which layers take part in sparse back-propagation, and how keep counts are rounded.

    Args:
        channel_multiple: the channels kept of a layer, of all groups together, are rounded to the
            nearest multiple of this, at least one multiple and at most all channels. `1` means
            exactly `max(int((1 - drop_rate) * C), 1)`, the published code's rule, in each group.
            `"auto"` picks by the device of the model: 16 on CPU, where oneDNN blocks channels by
            16, and 8 elsewhere, where tensor cores want multiples of 8.
        min_channels: layers with fewer output channels stay dense.
        filter_fn: `filter_fn(module, fqn) -> bool` says whether a module takes part; `fqn` is its
            name as in `model.named_modules()`. None lets all take part but the classifier of a
            timm model (`model.get_classifier()`): it has few of the FLOPs, and what its backward
            leaves out is missing in every other layer.
        targets: the kinds of layer that take part, of `"conv"`, `"depthwise"` (convolutions whose
            output channels read one input channel each) and `"linear"`. Depthwise convolutions
            are not among them by default: with small kernels on a CPU, moving their channels
            costs more than it saves.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.

    Example:
        >>> config = SparsityConfig(filter_fn=lambda module, fqn: not fqn.startswith("stem"))
        >>> config.min_channels
        32
    """

    channel_multiple: int | Literal["auto"] = "auto"
    min_channels: int = 32
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    targets: tuple[str, ...] = DEFAULT_TARGETS

    def __post_init__(self) -> None:
        if self.channel_multiple != "auto":
            _check_positive_int("channel_multiple", self.channel_multiple, ' or "auto"')
        _check_positive_int("min_channels", self.min_channels)
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise TypeError(
                "filter_fn must be a callable (module, fqn) -> bool or None,"
                f" got {self.filter_fn!r}"
            )
        if isinstance(self.targets, str) or not isinstance(self.targets, tuple):
            raise TypeError(f'targets must be a tuple such as ("conv",), got {self.targets!r}')
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(f"targets must be of {TARGETS}, at least one, got {self.targets!r}")


def _check_positive_int(name: str, value: object, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int{alternative}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
