"""Slots: the places of a model's layers in the runtime sparsity tensor.

Slots are numbered from the model and not from the compiled graph, because a warm compile cache
skips every graph pass, graph breaks cut a model into several graphs, and all of them share one
tensor.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, cast

import torch
from ssprop_passes.sites.site import MIN_KEEP_COUNT, Slot
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ssprop_fx.config import SparsityConfig

__all__ = ["SlotTable", "find_slots", "keep_count"]

# From here on rounding to a multiple of 16 is at most a 32nd of the channels off.
_MANY_CHANNELS = 256


@dataclass(frozen=True)
class SlotTable:
    """A model's layers that can take part, and why the others do not.

    Attributes:
        slots: one entry a participating layer, in `named_modules()` order.
        excluded: name of each layer that stays dense -> the reason.
        rates: name of each layer whose drop rate is its own -> that rate.
    """

    slots: tuple[Slot, ...]
    excluded: dict[str, str]
    rates: dict[str, float] = field(default_factory=dict)


def find_slots(model: nn.Module, config: SparsityConfig) -> SlotTable:
    """Give a slot to each convolution and linear layer of `model` that takes part.

    Args:
        model: the model, before compilation.
        config: says which layers take part.

    Returns:
        The table of slots.

    Raises:
        ValueError: a layer's weight does not exist yet, or a pattern of `config.rates` gives no
            layer its rate.
    """
    slots: list[Slot] = []
    excluded: dict[str, str] = {}
    classifier = set() if config.filter_fn else _classifier_modules(model)
    layers = _find_layers(model)
    rates = _match_rates(list(layers), config.rates)
    for name, (module, target) in layers.items():
        channels, groups = _channels_and_groups(module)
        if target not in config.targets:
            excluded[name] = f"{target} layers are not among the targets"
        elif config.filter_fn is not None and not config.filter_fn(module, name):
            excluded[name] = "filtered out by filter_fn"
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            excluded[name] = "nn.MultiheadAttention takes its weight and does not call it"
        elif module in classifier:
            excluded[name] = "the classifier"
        elif channels < config.min_channels:
            excluded[name] = f"fewer than min_channels={config.min_channels} output channels"
        elif rates.get(name) == 0:
            excluded[name] = "its drop rate is 0 in rates"
        elif channels // groups % config.block:
            of_group = " of a group" if groups > 1 else ""
            excluded[name] = f"its channels{of_group} are no multiple of block={config.block}"
        else:
            slots.append(Slot(len(slots), name, channels, groups))
    own = {slot.name: rates[slot.name] for slot in slots if slot.name in rates}
    return SlotTable(tuple(slots), excluded, own)


def _find_layers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return each layer that owns a weight, and its kind, by name."""
    layers: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
            raise ValueError(
                f"model must have all its weights, but {name!r} is a lazy layer that has none yet:"
                " run one forward before ssprop_compile"
            )
        if (target := _target_maybe(module)) is not None:
            layers[name] = module, target
    return layers


def _match_rates(layers: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    """Return the rate that the first matching pattern gives a layer, by the layer's name."""
    matched: dict[str, str] = {}
    for pattern in rates:
        names = [name for name in layers if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(
                f"rates has the pattern {pattern!r}, which matches no convolution or linear layer"
                f" of the model; layers have names such as {', '.join(map(repr, layers[:3]))}"
            )
        new = [name for name in names if name not in matched]
        if not new:
            raise ValueError(
                f"rates has the pattern {pattern!r} behind others that match all of its layers,"
                f" such as {matched[names[0]]!r}: the first that matches counts"
            )
        matched.update(dict.fromkeys(new, pattern))
    return {name: rates[pattern] for name, pattern in matched.items()}


def _target_maybe(module: nn.Module) -> str | None:
    """Return the kind of layer that owns a weight of a convolution or linear layer, else None."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    # By attributes, because some libraries' layers do not derive from torch's. Two dimensions
    # alone may also be an embedding, three a bilinear layer or a normalisation.
    if weight.ndim == 2:
        return "linear" if hasattr(module, "in_features") else None
    if weight.ndim not in (3, 4, 5) or (weight.ndim == 3 and not hasattr(module, "kernel_size")):
        return None
    return "depthwise" if _is_depthwise(module) else "conv"


def _channels_and_groups(module: nn.Module) -> tuple[int, int]:
    """Return a layer's output channels and the number of groups that they are selected in."""
    outputs, inputs = cast(torch.Tensor, module.weight).shape[:2]
    groups = int(getattr(module, "groups", 1))
    channels = inputs * groups if getattr(module, "transposed", False) else outputs
    return int(channels), 1 if _is_depthwise(module) else groups


def _is_depthwise(module: nn.Module) -> bool:
    """Say whether each output channel of a convolution reads one input channel of several."""
    outputs, inputs = cast(torch.Tensor, module.weight).shape[:2]
    groups = int(getattr(module, "groups", 1))
    inputs_of_group = outputs // groups if getattr(module, "transposed", False) else inputs
    return groups > 1 and inputs_of_group == 1


def _classifier_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules of the layer that gives a timm model's classes, none for other models."""
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    heads = classifier if isinstance(classifier, (list, tuple)) else [classifier]
    return {m for head in heads if isinstance(head, nn.Module) for m in head.modules()}


def keep_count(
    channels: int,
    drop_rate: float,
    multiple: int | Literal["auto"] = 1,
    groups: int = 1,
    block: int = 1,
) -> int:
    """Return how many channels of each group a backward keeps at `drop_rate`.

    Multiple 1 is the published code's rule, `max(int((1 - drop_rate) * channels), 1)` (ssProp,
    arXiv 2408.12561), in each group. With others, or blocks, the kept channels of all groups
    together are the nearest multiple, at least one of each group. On torch releases below 2.15 the
    smallest keep count is 2 blocks (`MIN_KEEP_COUNT`).

    Args:
        channels: output channels of the layer.
        drop_rate: fraction in [0, 1) left out.
        multiple: channels are kept in multiples of this; `"auto"` stands for 8, and for 16 in
            layers of 256 channels or more.
        groups: number of groups that channels are selected in.
        block: channels of a group are kept in multiples of this as well, which they must be one of.

    Returns:
        The keep count, in [1, channels / groups].

    Examples:
        >>> keep_count(64, 0.8), keep_count(64, 0.8, multiple=16), keep_count(24, 0.8, multiple=16)
        (12, 16, 16)
        >>> keep_count(64, 0.8, groups=4), keep_count(64, 0.8, multiple=16, groups=4)
        (3, 4)
        >>> keep_count(64, 0.8, block=4), keep_count(64, 0.8, multiple=16, groups=2, block=3)
        (12, 24)
        >>> keep_count(128, 0.8, multiple="auto"), keep_count(512, 0.8, multiple="auto")
        (24, 96)
    """
    if multiple == "auto":
        multiple = 8 if channels < _MANY_CHANNELS else 16
    channels_of_group = channels // groups
    step = math.lcm(multiple // math.gcd(multiple, groups), block)
    kept = (1 - drop_rate) * channels_of_group
    rounded = int(kept) if multiple == block == 1 else math.floor(kept / step + 0.5) * step
    return min(max(rounded, step, MIN_KEEP_COUNT * block), channels_of_group)
