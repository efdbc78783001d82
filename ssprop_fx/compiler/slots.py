"""Slots: the indices of a model's layers in the runtime sparsity tensor.

Slots are numbered from the model, not from the compiled graph: a warm compile cache skips every
graph pass, and graph breaks split a model into several graphs that share one tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from ssprop_passes.sites.site import Slot
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ssprop_fx.config import SparsityConfig

__all__ = ["COMPLEX", "SlotTable", "find_slots", "own_weight_maybe", "weight_owners"]

# Torch splits a complex convolution into three real ones, which would each choose channels.
COMPLEX = "its numbers are complex, and only real layers take part"

_OF_ATTENTION = "the projections of nn.MultiheadAttention keep all channels"


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
        RuntimeError: `config.filter_fn` failed.
        ValueError: a layer's weight does not exist yet, or a pattern in `config.rates` applies to
            no layer.
    """
    slots: list[Slot] = []
    excluded: dict[str, str] = {}
    classifier = set() if config.filter_fn else _classifier_modules(model)
    layers, tied = _find_layers(model)
    rates = _match_rates(list(layers), config.rates, tied)
    for name, (module, target) in layers.items():
        channels, groups = _channels_and_groups(module)
        if target not in config.targets:
            excluded[name] = f"{target} layers are not among the targets"
        elif not _passes_filter(config, module, name):
            excluded[name] = "filtered out by filter_fn"
        elif cast(torch.Tensor, own_weight_maybe(module)).is_complex():
            excluded[name] = COMPLEX
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            excluded[name] = _OF_ATTENTION
        elif module in classifier:
            excluded[name] = "the classifier"
        elif config.axis == "sample" and name not in rates:
            excluded[name] = "its channels are all kept: samples are chosen"
        elif channels < config.min_channels:
            excluded[name] = f"fewer than min_channels={config.min_channels} output channels"
        elif rates.get(name) == 0:
            excluded[name] = "its drop rate is 0 in rates"
        elif channels // groups % config.block:
            of_group = " of a group" if groups > 1 else ""
            excluded[name] = f"its channels{of_group} are no multiple of block={config.block}"
        else:
            slots.append(Slot(len(slots), name, channels, groups))
    for name, module in model.named_modules():
        if name not in layers and name not in tied and _may_be_linear(module):
            excluded[name] = "its weight may be an embedding: in_features and out_features tell"
        if isinstance(module, nn.MultiheadAttention):
            excluded[name] = _OF_ATTENTION
    for name, owner in tied.items():
        excluded[name] = f"it shares the weight of {owner!r}, and counts under that name"
    own = {slot.name: rates[slot.name] for slot in slots if slot.name in rates}
    return SlotTable(tuple(slots), excluded, own)


def own_weight_maybe(module: nn.Module) -> torch.Tensor | None:
    """Return a module's weight, or what stands for its shape, without running any code of it.

    Reading `module.weight` runs the parametrizations of the weight. Spectral norm then takes a step
    of its power iteration, so looking at a model would change it. This returns the largest original
    tensor instead, which has the weight's shape for spectral norm, orthogonal and weight norm. It
    ignores a weight that is a property of a class.
    """
    for held in (module._parameters, module._buffers, vars(module)):
        if isinstance(weight := held.get("weight"), torch.Tensor):
            return weight
    if is_parametrized(module, "weight"):
        originals = cast(nn.ModuleDict, module.parametrizations)["weight"].parameters(recurse=False)
        return max(originals, key=torch.Tensor.numel, default=None)
    return None


def weight_owners(model: nn.Module) -> dict[int, str]:
    """Return the name that each parameter of a product counts for, by its id.

    A parameter called `weight` counts for the first convolution or linear layer that owns it, else
    for the first other module. So a head that is tied to an embedding counts as itself. Any other
    parameter of two dimensions or more counts for itself, under its own name.
    """
    owned: list[tuple[bool, str, torch.Tensor]] = []
    for name, module in model.named_modules():
        is_layer = _target_maybe(module) is not None
        for key, parameter in module._parameters.items():
            if key == "weight" and parameter is not None:
                owned.append((not is_layer, name, parameter))
            elif isinstance(module, ParametrizationList):
                continue  # what a weight is computed from, not a weight
            elif parameter is not None and parameter.ndim > 1:
                owned.append((True, f"{name}.{key}".lstrip("."), parameter))
    owners: dict[int, str] = {}
    for _, name, parameter in sorted(owned, key=lambda entry: entry[0]):
        owners.setdefault(id(parameter), name)
    return owners


def _find_layers(
    model: nn.Module,
) -> tuple[dict[str, tuple[nn.Module, str]], dict[str, str]]:
    """Return each convolution and linear layer with a weight of its own, with its kind, by name.

    And each layer that shares a weight: its name -> that of the layer whose weight it is.
    """
    layers: dict[str, tuple[nn.Module, str]] = {}
    tied: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module._parameters.get("weight"), nn.UninitializedParameter):
            raise ValueError(
                f"model must have all its weights, but {name!r} is a lazy layer without a weight:"
                " run one forward before ssprop_compile"
            )
    owners = weight_owners(model)
    for name, module in model.named_modules():
        weight = own_weight_maybe(module)
        if (target := _target_maybe(module)) is None:
            continue
        if (owner := owners.get(id(weight), name)) != name:
            tied[name] = owner
        else:
            layers[name] = module, target
    return layers, tied


def _passes_filter(config: SparsityConfig, module: nn.Module, name: str) -> bool:
    if config.filter_fn is None:
        return True
    try:
        return bool(config.filter_fn(module, name))
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"filter_fn failed for the layer {name!r} with {what}") from error


def _match_rates(
    layers: Sequence[str], rates: Mapping[str, float], tied: Mapping[str, str]
) -> dict[str, float]:
    """Return the rate of each layer that a pattern matches, by name; the first match counts."""
    matched: dict[str, str] = {}
    for pattern in rates:
        names = [name for name in layers if fnmatchcase(name, pattern)]
        if not names and (shared := [name for name in tied if fnmatchcase(name, pattern)]):
            raise ValueError(
                f"rates has the pattern {pattern!r}, which matches only layers that share another's"
                f" weight: name that one, such as {tied[shared[0]]!r} for {shared[0]!r}"
            )
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
    weight = own_weight_maybe(module)
    if weight is None:
        return None
    # Attributes decide, because some libraries' layers do not derive from torch's. A weight of two
    # dimensions may also be an embedding's; of three, a bilinear layer's or a normalisation's; with
    # one size above 1, a scale.
    is_vector = weight.numel() == max(weight.shape, default=0)
    if weight.ndim == 2:
        is_shaped = _bias_length(module) in weight.shape and not is_vector
        return "linear" if is_shaped or hasattr(module, "in_features") else None
    may_scale = weight.ndim == 3 or is_vector
    if weight.ndim not in (3, 4, 5) or (may_scale and not hasattr(module, "kernel_size")):
        return None
    return "depthwise" if _is_depthwise(module) else "conv"


def _may_be_linear(module: nn.Module) -> bool:
    """Return whether a module has a weight that may be an embedding's or a linear layer's."""
    weight = own_weight_maybe(module)
    is_torchs = type(module).__module__.startswith("torch.nn.")
    return weight is not None and weight.ndim == 2 and not (is_torchs or _target_maybe(module))


def _bias_length(module: nn.Module) -> int | None:
    """Return the length of a module's own bias, None unless it has one of one dimension."""
    bias = module._parameters.get("bias")
    return len(bias) if isinstance(bias, torch.Tensor) and bias.ndim == 1 else None


def _channels_and_groups(module: nn.Module) -> tuple[int, int]:
    """Return a layer's output channels and the number of groups in which they are selected."""
    weight = cast(torch.Tensor, own_weight_maybe(module))
    outputs, inputs = weight.shape[:2]
    if weight.ndim == 2:
        # Some layers hold [in, out], such as the Conv1D of GPT-2.
        named: tuple[Any, ...] = getattr(module, "out_features", None), _bias_length(module)
        return int(next((n for n in named if n in weight.shape), outputs)), 1
    groups = int(getattr(module, "groups", 1))
    channels = inputs * groups if getattr(module, "transposed", False) else outputs
    return int(channels), 1 if _is_depthwise(module) else groups


def _is_depthwise(module: nn.Module) -> bool:
    """Return whether each output channel of a convolution reads only one of several inputs."""
    outputs, inputs = cast(torch.Tensor, own_weight_maybe(module)).shape[:2]
    groups = int(getattr(module, "groups", 1))
    inputs_of_group = outputs // groups if getattr(module, "transposed", False) else inputs
    return groups > 1 and inputs_of_group == 1


def _classifier_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules of a timm model's classifier; none for other models."""
    get_classifier = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    heads = classifier if isinstance(classifier, (list, tuple)) else [classifier]
    return {m for head in heads if isinstance(head, nn.Module) for m in head.modules()}
