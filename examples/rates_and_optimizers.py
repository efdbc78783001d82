"""Drop rates by depth, a controller and freeze_dropped, compared with one rate, on digits.

Trains a small network with one drop rate for all layers, with the weights of dropped channels
frozen (`freeze_dropped`), with rates that fall or rise from input to output (`by_depth`), and with
rates that a controller adapts (`KeptMass`). All use the FLOPs of the one rate, with SGD and with
AdamW. Each row shows a method's test accuracy over seeds, its standard deviation, test loss, and
the computed share of the backward's FLOPs.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssprop_fx import (
    KeptMass,
    SparsityConfig,
    SparsityScheduler,
    by_depth,
    constant,
    freeze_dropped,
    inspect_sites,
    report,
    ssprop_compile,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.05),
}


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        drop_rate: constant drop rate of the schedule.
        slope: slope of `by_depth`.
        mass: target of a `KeptMass` controller whose budget is the cost at `drop_rate`.
        freezes: whether to use `freeze_dropped`.
    """

    drop_rate: float = 0.0
    slope: float = 0.0
    mass: float | None = None
    freezes: bool = False


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images [N, 1, 8, 8] and classes, half for training and half for test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(images) // 2], order[len(images) // 2 :]
    return images[train], classes[train], images[test], classes[test]


def make_model() -> nn.Sequential:
    """Return six convolutions and a classifier."""
    layers: list[nn.Module] = []
    widths = [1, 32, 32, 64, 64, 96, 96]
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        stride = 2 if i in (2, 4) else 1
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def train(
    method: Method, optimizer_name: str, seed: int, args: argparse.Namespace
) -> tuple[float, float, float]:
    """Train once.

    Returns:
        Test accuracy in percent; test loss; computed share of the backward's FLOPs.
    """
    torch.compiler.reset()
    images, classes, test_images, test_classes = load_data(seed)
    torch.manual_seed(seed)
    model = make_model()
    config = SparsityConfig(channel_multiple=4, gate=False)
    controller = None
    if method.drop_rate:
        inspection = inspect_sites(model, images[: args.batch_size], config=config)
        if method.slope:
            rates = by_depth(inspection, method.drop_rate, method.slope)
            config = SparsityConfig(channel_multiple=4, gate=False, rates=rates)
        if method.mass is not None:
            budget = 1 - inspection.saved_at(method.drop_rate)
            controller = KeptMass(method.mass, budget=budget, every=10)
    scheduler = SparsityScheduler(constant(method.drop_rate), controller)
    compiled = ssprop_compile(model, scheduler, config=config, backend=args.backend)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if method.freezes:
        freeze_dropped(optimizer, compiled)
    computed = []
    for _ in range(args.epochs):
        # Leave out a short last batch, which would cause a recompilation.
        whole = len(images) // args.batch_size * args.batch_size
        for batch in torch.randperm(len(images))[:whole].split(args.batch_size):
            loss = nn.functional.cross_entropy(compiled(images[batch]), classes[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if method.drop_rate:
                made = report(compiled)
                computed.append(1 - made.saved_flops / made.backward_flops)
            scheduler.step()
    model.eval()
    with torch.no_grad():
        logits = model(test_images)
    accuracy = 100 * float((logits.argmax(1) == test_classes).float().mean())
    loss = float(nn.functional.cross_entropy(logits, test_classes))
    return accuracy, loss, statistics.fmean(computed or [1.0])


def main(argv: Sequence[str] | None = None) -> None:
    """Train each method with each optimizer and seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--drop-rate", type=float, default=0.7)
    parser.add_argument("--slope", type=float, default=0.25, help="slope of by_depth")
    parser.add_argument("--mass", type=float, default=0.95, help="target of the controller")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--backend", default="aot_eager", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    rate = args.drop_rate
    methods = {
        "dense": Method(),
        "one rate": Method(rate),
        "one rate, frozen": Method(rate, freezes=True),
        "by depth": Method(rate, slope=args.slope),
        "by depth, reversed": Method(rate, slope=-args.slope),
        "kept mass": Method(rate, mass=args.mass),
    }
    print(f"{'optimizer':9}  {'method':18} {'top-1 %':>8} {'sd':>5} {'loss':>7} {'backward':>8}")
    for optimizer in args.optimizers:
        for name, method in methods.items():
            runs = [train(method, optimizer, seed, args) for seed in range(args.seeds)]
            accuracies, losses, computed = zip(*runs, strict=True)
            spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
            print(
                f"{optimizer:9}  {name:18} {statistics.fmean(accuracies):8.2f} {spread:5.2f}"
                f" {statistics.fmean(losses):7.3f} {statistics.fmean(computed):8.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
