"""Memorized sparse back-propagation (Zhang et al., arXiv 1905.10194) of an MLP on digits."""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training and test images, [N, 64], and their classes: four fifths and one."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    classes = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    split = len(images) * 4 // 5
    train, test = order[:split], order[split:]
    return images[train], classes[train], images[test], classes[test]


def train(
    seed: int, drop_rate: float, memory: float, args: argparse.Namespace
) -> tuple[float, float]:
    """Return the test accuracy in percent after training, and the seconds of an epoch."""
    torch.compiler.reset()
    images, classes, test_images, test_classes = load_data(seed)
    torch.manual_seed(seed)
    widths = [64, *[args.hidden] * args.layers]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    classifier = nn.Linear(args.hidden, 10)
    config = SparsityConfig(
        channel_multiple=1,
        filter_fn=lambda module, fqn: module is not classifier,
        memory=memory,
        gate=False,
    )
    model = ssprop_compile(
        nn.Sequential(*layers, classifier),
        SparsityScheduler(constant(drop_rate)),
        config=config,
        backend=args.backend,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    epochs = []
    for _ in range(args.epochs):
        start = time.perf_counter()
        # Without a short last batch, which would be compiled for anew.
        whole = len(images) // args.batch_size * args.batch_size
        for batch in torch.randperm(len(images))[:whole].split(args.batch_size):
            loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        epochs.append(time.perf_counter() - start)
    model.eval()
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_classes).float().mean()
    # Not the first epoch, which compiles.
    return 100 * right.item(), statistics.median(epochs[1:] or epochs)


def main(argv: Sequence[str] | None = None) -> None:
    """Train each method with each seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=500, help="units of a hidden layer")
    parser.add_argument("--layers", type=int, default=2, help="hidden layers")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--drop-rate", type=float, default=0.96)
    parser.add_argument("--memory", type=float, nargs="+", default=[0.5, 0.9], help="of MSBP, eta")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    methods = {"dense": (0.0, 0.0), "SBP": (args.drop_rate, 0.0)}
    methods |= {f"MSBP, eta {eta:g}": (args.drop_rate, eta) for eta in args.memory}
    print(f"{'method':16} {'accuracy %':>10} {'sd':>5} {'ms an epoch':>12}")
    for name, (drop_rate, memory) in methods.items():
        runs = [train(seed, drop_rate, memory, args) for seed in range(args.seeds)]
        accuracies, seconds = zip(*runs, strict=True)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        mean, time_ms = statistics.mean(accuracies), 1e3 * statistics.median(seconds)
        print(f"{name:16} {mean:10.2f} {spread:5.2f} {time_ms:12.1f}", flush=True)


if __name__ == "__main__":
    main()
