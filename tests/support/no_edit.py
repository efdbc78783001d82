"""What the tests of the no-edit backend share."""

import torch
from blocks import Block
from torch import Tensor, nn

from ssprop_fx.named_backend.autostep import SteppedVariant, stepped_variant_maybe
from ssprop_fx.named_backend.plugin import ssprop

EXACT = {"backend": "aot_eager", "channel_multiple": 1, "min_channels": 1}


def loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().sum()


def everywhere(module: nn.Module, name: str) -> bool:
    return True


def compiled(model: nn.Module, schedule: str, **options: object) -> nn.Module:
    options = {**EXACT, "schedule": schedule, **options}
    return torch.compile(model, backend=ssprop, options=options)


def variant(model: nn.Module) -> SteppedVariant:
    found = stepped_variant_maybe(model)
    assert found is not None
    return found


def kept_rows(weight: Tensor) -> int:
    return int((weight.grad.flatten(1).abs().sum(1) > 0).sum())


class Blocks(nn.Module):
    """Dynamo runs its loop and head eagerly, with one compiled block for all iterations."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(32) for _ in range(3)])
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)
