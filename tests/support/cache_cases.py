"""Cases for tests of the compile cache, each time in a new process.

As a script it takes names of cases, trains each for two steps, and prints the results.
`--meet FOLDER COUNT` before them: wait before the first case until COUNT processes are ready.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ssprop_passes.transforms.sparse_backward import SparseBackwardPass
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, report, ssprop_compile


class Net(nn.Module):
    """Two layers of equal shapes; they run in this order, whatever the order of their slots."""

    def __init__(
        self,
        order: str = "first second",
        dilation: int = 1,
        factor: float = 1.0,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__()
        for name in order.split():
            setattr(self, name, nn.Conv2d(8, 8, 3, padding=dilation, dilation=dilation))
        self.activation = activation
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.activation(self.first(x)) * self.factor)


@dataclass(frozen=True)
class Case:
    """A model and its configuration.

    Attributes:
        model: makes the model.
        config: fields of SparsityConfig that differ from the first case.
        rate: the drop rate.
        factor: multiplies all weights.
        shares: the case whose cache entry this case may use; empty for none.
    """

    model: Callable[[], Net] = Net
    config: dict[str, Any] = field(default_factory=dict)
    rate: float = 0.5
    factor: float = 1.0
    shares: str = ""


RATES = {"rates": {"second": 0.75}}
CASES = {
    "plain": Case(),
    # The compiled code does not depend on these.
    "another rate": Case(rate=0.75, shares="plain"),
    "another multiple": Case(config={"channel_multiple": 4}, rate=0.75, shares="plain"),
    "rates by layer": Case(config=RATES, shares="plain"),
    "other values": Case(factor=1.5, shares="plain"),
    # The configuration.
    "mean_abs": Case(config={"score": "mean_abs"}),
    "sampled": Case(config={"select": "sampled"}),
    "weight": Case(config={"gradients": "weight"}),
    "block": Case(config={"block": 2}),
    "memory": Case(config={"memory": 0.5}),
    "telemetry": Case(config={"telemetry": True}),
    "samples": Case(config={"axis": "sample"}),
    "fewer samples": Case(config={"axis": "sample"}, rate=0.75, shares="samples"),
    "constants": Case(config={"specialize": True}),
    "other constants": Case(config={"specialize": True}, rate=0.75),
    "filter": Case(config={"filter_fn": lambda module, name: name != "first"}),
    # The slots: the same graph, but its layers have other slots.
    "swapped slots": Case(lambda: Net("second first"), RATES),
    "later slots": Case(lambda: Net("unused first second"), RATES),
    # The model: shapes and layers do not change.
    "activation": Case(lambda: Net(activation=torch.relu)),
    "dilation": Case(lambda: Net(dilation=2)),
    "factor": Case(lambda: Net(factor=2.0)),
}


def run(case: Case) -> dict[str, Any]:
    """Train a case for two steps; return what the compiler did, and digests of all gradients."""
    runs: list[int] = []
    transform = SparseBackwardPass.transform
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = case.model()
    torch.manual_seed(0)
    # By name, so that all cases have the same weights, whatever the order of their layers.
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(case.factor * (torch.rand(parameter.shape) - 0.5))
    torch.manual_seed(1)
    images = torch.randn(2, 4, 8, 12, 12)
    config = {"channel_multiple": 1, "min_channels": 1, "specialize": False, "gate": False}
    scheduler = SparsityScheduler(constant(case.rate))
    config = SparsityConfig(**{**config, **case.config})
    compiled = ssprop_compile(model, scheduler, config=config)
    found = []
    SparseBackwardPass.transform = lambda self, graph: (runs.append(1), transform(self, graph))[1]
    try:
        for x in images:
            model.zero_grad()
            compiled(x).square().sum().backward()
            found += [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
    finally:
        SparseBackwardPass.transform = transform
    return {
        "pass_runs": len(runs),
        "hits": torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"],
        "code_hits": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"],
        "code_misses": torch._dynamo.utils.counters["inductor"]["fxgraph_cache_miss"],
        "sites": [[site.name, site.kept, site.reason] for site in report(compiled).sites],
        "rows": {n: kept_rows(getattr(model, n).weight) for n in ("first", "second")},
        "gradients": [hashlib.sha256(grad.numpy().tobytes()).hexdigest() for grad in found],
    }


def kept_rows(weight: Tensor) -> int:
    return int((weight.grad.flatten(1).abs().sum(1) > 0).sum())


def meet(folder: str, count: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    while len(os.listdir(folder)) < int(count):
        time.sleep(0.01)


if __name__ == "__main__":
    names = sys.argv[1:]
    if names[0] == "--meet":
        meet(*names[1:3])
        names = names[3:]
    print(json.dumps({name: run(CASES[name]) for name in names}))
