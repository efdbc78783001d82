"""Ways to compile a model, situations in which it is called, and what happens in each.

`python tests/support/calls.py` prints the table of docs/trust.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from no_edit import compiled
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile

RATE = 0.5
SPARSE = "sparse"
EVAL = "dense; `NoEffectWarning` that names `eval()`"
NOTHING = "no gradient, no warning"

Call = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """Three layers; the last two may have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


def by_function(model: nn.Module, **kwargs: bool) -> nn.Module:
    config = SparsityConfig(channel_multiple=1, min_channels=1)
    scheduler = SparsityScheduler(constant(RATE))
    return ssprop_compile(model, scheduler, config=config, backend="aot_eager", **kwargs)


def in_place(model: nn.Module) -> nn.Module:
    by_function(model, in_place=True)
    return model


def by_name(model: nn.Module) -> nn.Module:
    return compiled(model, f"constant:rate={RATE}")


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "`ssprop_compile`": by_function,
    "`in_place=True`": in_place,
    '`torch.compile(backend="ssprop")`': by_name,
}


@dataclass(frozen=True)
class Situation:
    """A situation in which a compiled model is called.

    Attributes:
        text: its name in the table.
        prepare: changes the model before it is compiled.
        call: makes what the step calls, from the model and what it became.
        sees: what happens.
        compile: compiles the model, given the way.
        before: what happens before the step.
        frozen: prefix of the names of parameters without a gradient.
    """

    text: str
    prepare: Callable[[Net], object] = lambda model: None
    call: Callable[[nn.Module], Call] = lambda model: model
    sees: str = SPARSE
    compile: Callable[[Callable[[nn.Module], nn.Module], nn.Module], nn.Module] = field(
        default=lambda way, model: way(model)
    )
    before: Callable[[nn.Module, Call, Tensor], object] = lambda net, call, x: None
    frozen: str = "-"


def root_in_eval(model: Net) -> None:
    model.training = False


def tie(model: Net) -> None:
    model.c.weight = model.b.weight


def with_other_tensors(model: nn.Module) -> Call:
    """Call the model with tensors that are no parameters, and let their gradients be theirs."""

    def call(x: Tensor) -> Tensor:
        others = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            others[name].register_hook(lambda grad, p=parameter: p.__setattr__("grad", grad))
        return torch.func.functional_call(model, others, (x,))

    return call


def freeze_for_a_step(net: nn.Module, call: Call, x: Tensor) -> None:
    net.requires_grad_(False)
    call(x)
    net.requires_grad_(True)


def twice(way: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    return way(way(model))


def beside_another(way: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    other, x = way(Net().double()), torch.randn(4, 6, dtype=torch.float64)
    other(x).sum().backward()
    mine = way(model)
    other(x).sum().backward()
    return mine


SITUATIONS = (
    Situation("training"),
    Situation("eval mode, with gradients", lambda model: model.eval(), sees=EVAL),
    Situation("the root alone in eval mode", root_in_eval, sees=EVAL),
    Situation("all frozen", lambda model: model.requires_grad_(False), sees=NOTHING),
    Situation("some layers frozen", lambda model: model.a.requires_grad_(False), frozen="a."),
    Situation("frozen for a step, then not", before=freeze_for_a_step),
    Situation("`torch.func.functional_call` with other tensors", call=with_other_tensors),
    Situation("tied layers", tie),
    Situation("compiled twice", compile=twice),
    Situation("beside another model", compile=beside_another),
)


def table() -> str:
    """Return the table of docs/trust.md."""
    lines = [f"| situation | {' | '.join(WAYS)} |", "|---|" + "---|" * len(WAYS)]
    lines += [f"| {s.text} | {' | '.join([s.sees] * len(WAYS))} |" for s in SITUATIONS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
