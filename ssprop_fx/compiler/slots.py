"""Slots: the indices of a model's layers in the runtime sparsity tensor.

Slots are numbered from the model, not from the compiled graph: a warm compile cache skips every
graph pass, and graph breaks split a model into several graphs that share one tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

import torch
from ssprop_passes.sites.site import Slot
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ssprop_fx.config import SparsityConfig

__all__ = ["SlotTable", "find_slots"]


@dataclass(frozen=True)
class SlotTable:
    """The layers of a model that take part, and why the others do not.

    Attributes:
        slots: one entry for each participating layer, in `named_modules()` order.
        excluded: name of each layer that stays dense -> the reason.
        rates: name of each layer with its own drop rate -> that rate.
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
        ValueError: a layer's weight does not exist yet, or a pattern in `config.rates` applies to
            no layer.
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
    """Return each convolution and linear layer that owns a weight, with its kind, by name."""
    layers: dict[str, tuple[nn.Module, str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.UninitializedParameter):
            raise ValueError(
                f"model must have all its weights, but {name!r} is a lazy layer without a weight:"
                " run one forward before ssprop_compile"
            )
        if (target := _target_maybe(module)) is not None:
            layers[name] = module, target
    return layers


def _match_rates(layers: Sequence[str], rates: Mapping[str, float]) -> dict[str, float]:
    """Return the rate of each layer that a pattern matches, by name; the first match counts."""
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
                f"rates has the pattern {pattern!r} after others that match all of its layers,"
                f" such as {matched[names[0]]!r}: the first match counts"
            )
        matched.update(dict.fromkeys(new, pattern))
    return {name: rates[pattern] for name, pattern in matched.items()}


def _target_maybe(module: nn.Module) -> str | None:
    """Return the kind of a convolution or linear layer; None for any other module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    # Attributes decide, because some libraries' layers do not derive from torch's. A weight of two
    # dimensions may also be an embedding's; of three, a bilinear layer's or a normalisation's.
    if weight.ndim == 2:
        return "linear" if hasattr(module, "in_features") else None
    if weight.ndim not in (3, 4, 5) or (weight.ndim == 3 and not hasattr(module, "kernel_size")):
        return None
    return "depthwise" if _is_depthwise(module) else "conv"


def _channels_and_groups(module: nn.Module) -> tuple[int, int]:
    """Return a layer's output channels and the number of groups in which they are selected."""
    outputs, inputs = cast(torch.Tensor, module.weight).shape[:2]
    groups = int(getattr(module, "groups", 1))
    channels = inputs * groups if getattr(module, "transposed", False) else outputs
    return int(channels), 1 if _is_depthwise(module) else groups


def _is_depthwise(module: nn.Module) -> bool:
    """Return whether each output channel of a convolution reads only one of several inputs."""
    outputs, inputs = cast(torch.Tensor, module.weight).shape[:2]
    groups = int(getattr(module, "groups", 1))
    inputs_of_group = outputs // groups if getattr(module, "transposed", False) else inputs
    return groups > 1 and inputs_of_group == 1


def _classifier_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules of a timm model's classifier; none for other models."""
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    heads = classifier if isinstance(classifier, (list, tuple)) else [classifier]
    return {m for head in heads if isinstance(head, nn.Module) for m in head.modules()}
