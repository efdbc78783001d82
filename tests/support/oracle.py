"""An independent oracle: an eager dense backward that masks the gradient of unselected channels.

It shares no code with the packages under test. If a channel of grad_output is zero, so are its rows
of the weight gradient, its entry of the bias gradient and its share of the input gradient. So the
sparse backward must equal the dense backward of the masked grad_output.
"""

import copy
import functools
from collections.abc import Callable
from decimal import Decimal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# As the documentation says: before 2.15 torch cannot compile a keep count of 1 everywhere.
SMALLEST = 1 if int(torch.__version__.split(".")[1]) >= 15 else 2


def keep_count(channels: int, drop_rate: float) -> int:
    share_kept = float(1 - Decimal(str(drop_rate)))
    return min(max(int(share_kept * channels), SMALLEST), channels)


def mask_channels(
    grad: Tensor, drop_rate: float, groups: int = 1, dim: int = 1, score: str = "l2"
) -> Tensor:
    """Zero all channels except the strongest of each group."""
    by_channel = grad.movedim(dim, 0)
    scores = by_channel.flatten(1).norm(p=1 if score == "mean_abs" else 2, dim=1)
    per_group = scores.numel() // groups
    mask = torch.zeros_like(scores)
    for group in scores.split(per_group):
        k = keep_count(per_group, drop_rate)
        offset = group.storage_offset() - scores.storage_offset()
        mask[offset + group.argsort(descending=True)[:k]] = 1
    shape = [1] * grad.ndim
    shape[dim] = -1
    return grad * mask.view(shape)


LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


class MaskCalls(TorchFunctionMode):
    """Masks calls that take a layer's weight without calling the layer.

    A call from inside the layer is masked twice, by this mode and by the hook. The second mask
    changes nothing.
    """

    def __init__(self, owners: dict[int, nn.Module], drop_rate: float, score: str) -> None:
        super().__init__()
        self.owners = owners
        self.drop_rate = drop_rate
        self.score = score

    def __torch_function__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        module = self.owners.get(id(weight))
        if func in FUNCTIONS and module is not None and output.requires_grad:
            dim = -1 if isinstance(module, nn.Linear) else 1
            groups = selection_groups(module)
            mask = functools.partial(mask_channels, drop_rate=self.drop_rate, score=self.score)
            output.register_hook(lambda grad: mask(grad, groups=groups, dim=dim))
        return output


FUNCTIONS = {
    functional.linear,
    *(getattr(torch, f"conv{kind}{n}d") for kind in ("", "_transpose") for n in (1, 2, 3)),
}


def selection_groups(module: nn.Module) -> int:
    """Channels are selected within each group, but across all of a depthwise convolution."""
    groups = getattr(module, "groups", 1)
    return 1 if groups > 1 and module.in_channels == groups else groups


def oracle_gradients(
    model: nn.Module,
    inputs: Tensor,
    drop_rate: float,
    takes_part: Callable[[nn.Module, str], bool],
    loss: Callable[[Tensor], Tensor],
    score: str = "l2",
) -> dict[str, Tensor]:
    """Return the gradient of every parameter, and of the inputs as "inputs"."""
    model = copy.deepcopy(model)
    inputs = inputs.clone().requires_grad_()

    def install(module: nn.Module) -> None:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            if output.requires_grad:
                dim = -1 if isinstance(module, nn.Linear) else 1
                groups = selection_groups(module)
                mask = functools.partial(mask_channels, drop_rate=drop_rate, score=score)
                output.register_hook(lambda grad: mask(grad, groups=groups, dim=dim))

        module.register_forward_hook(hook)

    owners: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and takes_part(module, name):
            install(module)
            owners.setdefault(id(module.weight), module)
    with MaskCalls(owners, drop_rate, score):
        output = model(inputs)
    loss(output).backward()
    return gradients(model, inputs)


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if inputs.grad is not None:
        found["inputs"] = inputs.grad
    return found


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative error (2-norm) of each gradient.

    Some gradients are zero except for rounding, such as that of a bias before batch norm. The error
    is therefore relative to at least a millionth of the largest gradient.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-6 * max(want.double().norm() for want in expected.values())
    errors = {
        name: ((actual[name].double() - want.double()).norm() / want.double().norm().clamp(floor))
        for name, want in expected.items()
    }
    assert not any(error.isnan() for error in errors.values()), "NaN in a gradient"
    return {name: error.item() for name, error in errors.items()}


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative error of all gradients."""
    return max(relative_errors(actual, expected).values())


def weight_rows(layer: nn.Module) -> Tensor:
    """Return the weights that compute each output channel of a layer, one row per channel."""
    weight = layer.weight.detach()
    if not getattr(layer, "transposed", False):
        return weight.flatten(1)
    per_group = weight.shape[1]
    inputs = weight.shape[0] // layer.groups
    rows = [
        weight[group * inputs : (group + 1) * inputs, channel]
        for group in range(layer.groups)
        for channel in range(per_group)
    ]
    return torch.stack(rows).flatten(1)


def norms(rows: Tensor) -> Tensor:
    return rows.square().sum(1).sqrt()


# Each score, as a function of the rows of a gradient and of a weight, both [C, all].
ORACLE_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_abs": lambda grad, weight: grad.abs().sum(1) / grad.shape[1],
    "l2": lambda grad, weight: norms(grad),
    "l2_weight": lambda grad, weight: norms(grad) * norms(weight),
}


def channel_scores(name: str, grad: Tensor, layer: nn.Module) -> Tensor:
    """Return the scores, [C], for the gradient of a layer's output."""
    channels = grad.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
    return ORACLE_SCORES[name](channels, weight_rows(layer))


def inclusion_probabilities(scores: Tensor, k: int) -> Tensor:
    """Return min(1, c * scores); bisection finds the c for which they add up to k."""
    scores = scores.clamp(min=scores.mean() / 1000)
    low, high = 0.0, float(1 / scores.min())
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (c * scores).clamp(max=1).sum() < k else (low, c)
    return (high * scores).clamp(max=1)


def channel_factors(
    select: str, scores: Tensor, k: int, groups: int, block: int, kept: Tensor | None
) -> Tensor:
    """Return the factor of each channel of grad_output, [C].

    Args:
        select: name of the selector.
        scores: [C].
        k: keep count of each group.
        groups: number of groups.
        block: channels are chosen in blocks of this many.
        kept: for a random selector, the channels that it kept, bool [C].
    """
    units = scores.view(groups, -1, block).sum(-1)
    factors = torch.zeros_like(units)
    for group, of_group in zip(factors, units, strict=True):
        if select == "topk":
            group[of_group.argsort(descending=True)[: k // block]] = 1
        else:
            group[:] = 1
            if select == "sampled":
                group[:] = 1 / inclusion_probabilities(of_group, k // block)
    factors = factors.repeat_interleave(block, 1).flatten()
    return factors if select == "topk" else factors * kept


def scaled_gradients(
    model: nn.Module, layer: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], factors: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients when each channel of one layer's grad_output is multiplied by a factor.

    Returns:
        The gradients, otherwise dense, and grad_output itself.
    """
    seen: list[Tensor] = []

    def scale(grad: Tensor) -> Tensor:
        seen.append(grad.detach())
        if isinstance(layer, nn.Linear):
            return grad * factors
        return grad * factors.view(-1, *[1] * (grad.ndim - 2))

    def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(scale)

    handle = layer.register_forward_hook(hook)
    x = x.detach().clone().requires_grad_()
    names, leaves = zip(*model.named_parameters(), ("inputs", x), strict=True)
    found = torch.autograd.grad(loss(model(x)), leaves)
    handle.remove()
    return dict(zip(names, found, strict=True)), seen[0]


def find_factors(by_channel: list[Tensor], gradient: Tensor) -> Tensor:
    """Return the factors, [C], with which the channels' shares add up to a gradient."""
    shares = torch.stack([share.flatten() for share in by_channel], 1)
    return torch.linalg.lstsq(shares, gradient.reshape(-1, 1)).solution[:, 0]
