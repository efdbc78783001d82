"""A block that Dynamo compiles once for all blocks of its class."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two layers with a graph break between them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.first = nn.Linear(features, features)
        self.second = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        torch._dynamo.graph_break()
        return self.second(x).tanh()
