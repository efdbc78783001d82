"""Backwards with memory, step by step and eagerly; shares no code with the packages."""

import copy

import torch
from oracle import LAYERS, SMALLEST, keep_count, selection_groups
from torch import Tensor, nn
from torch.func import functional_call


class ReferenceLayer(nn.Module):
    """A layer whose backward is that of arXiv 1905.10194, with memories of batch means."""

    def __init__(
        self,
        layer: nn.Module,
        eta: float,
        drop_rate: float,
        gradients: str = "both",
        block: int = 1,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.eta = eta
        self.drop_rate = drop_rate
        self.gradients = gradients
        self.block = block
        self.kept_weight = weight
        self.memories: dict[int, Tensor] = {}
        self.call = 0

    def forward(self, x: Tensor) -> Tensor:
        # Two copies of the output: one gives the weight its gradient, the other the input.
        for_weight = self.layer(x.detach())
        detached = {name: p.detach() for name, p in self.layer.named_parameters()}
        for_input = functional_call(self.layer, detached, (x,))
        call, self.call = self.call, self.call + 1
        selected: list[Tensor] = []
        output = for_input + (for_weight - for_weight.detach())
        output.register_hook(lambda grad: selected.append(self.select(grad, call)))
        if self.gradients != "input":
            for_weight.register_hook(lambda _grad: selected[-1])
        if self.gradients != "weight" and for_input.requires_grad:
            for_input.register_hook(lambda _grad: selected[-1])
        return output

    def select(self, grad: Tensor, call: int) -> Tensor:
        shape = grad.shape
        if isinstance(self.layer, nn.Linear):
            grad = grad.reshape(-1, shape[-1])
        memory = self.memories.get(call, torch.zeros_like(grad[0]))
        # If eta is 0, the shape may change from call to call.
        g = grad + self.eta * memory if self.eta else grad
        scores = g.transpose(0, 1).flatten(1).norm(dim=1)
        factors = torch.zeros_like(scores)
        groups = selection_groups(self.layer)
        units = scores.view(groups, -1, self.block).sum(-1)
        k = keep_count(scores.numel() // groups, self.drop_rate) // self.block
        k = max(k, min(SMALLEST, units.shape[1]))
        for group, of_group in zip(factors.view(groups, -1, self.block), units, strict=True):
            group[of_group.argsort(descending=True)[:k]] = self.kept_weight
        s = g * factors.view(-1, *[1] * (g.ndim - 2))
        self.memories[call] = (g - s).mean(0)
        return s.reshape(shape)


def reference(model: nn.Module, **options: object) -> nn.Module:
    """Return a copy of a model in which each layer is a `ReferenceLayer`."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LAYERS):
                setattr(parent, name, ReferenceLayer(child, **options))

    def begin(_module: nn.Module, _args: object) -> None:
        for module in model.modules():
            if isinstance(module, ReferenceLayer):
                module.call = 0

    model.register_forward_pre_hook(begin)
    return model


def memories(model: nn.Module) -> dict[str, Tensor]:
    """Return the memories of a reference model, under the names that the package uses."""
    return {
        f"{name}@{call}" if call else name: tensor
        for name, layer in model.named_modules()
        if isinstance(layer, ReferenceLayer)
        for call, tensor in layer.memories.items()
    }


def loss(output: Tensor) -> Tensor:
    return (output - 0.3).square().mean() + output.sin().mean()


def train(model: nn.Module, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    for x in batches:
        optimizer.zero_grad()
        loss(model(x)).backward()
        optimizer.step()
