"""Fine-tuning: a network trained on the digits 0 to 4 learns 5 to 9, dense and sparse."""

import argparse
import copy
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssprop_fx import SparsityScheduler, bar, constant, ssprop_compile
from ssprop_fx.scheduling.base import Schedule


def load_data(first_class: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images [N, 1, 8, 8] and classes, from 0, of five digits, for training and for test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(digits.target) - first_class
    chosen = ((classes >= 0) & (classes < 5)).nonzero().flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    train, test = chosen[: len(chosen) * 4 // 5], chosen[len(chosen) * 4 // 5 :]
    return images[train], classes[train], images[test], classes[test]


def train(
    net: nn.Module, first_class: int, schedule: Schedule, epochs: int, args: argparse.Namespace
) -> float:
    """Train a network on five classes, and return its test accuracy in percent."""
    torch.compiler.reset()
    images, classes, test_images, test_classes = load_data(first_class)
    scheduler = SparsityScheduler(schedule)
    model = ssprop_compile(net, scheduler, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for _ in range(epochs):
        model.train()
        whole = len(images) // args.batch_size * args.batch_size
        for batch in torch.randperm(len(images))[:whole].split(args.batch_size):
            nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    model.eval()
    with torch.no_grad():
        return 100 * (model(test_images).argmax(1) == test_classes).float().mean().item()


def main(argv: Sequence[str] | None = None) -> None:
    """Train on the first five digits, fine-tune on the others, and print accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs on digits 0 to 4")
    parser.add_argument("--tune-epochs", type=int, default=4, help="epochs on digits 5 to 9")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--drop-rate", type=float, default=0.8, help="drop rate of sparse steps")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()
    )
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 5))
    accuracy = train(net, 0, constant(0.0), args.epochs, args)
    print(f"digits 0 to 4, dense   accuracy {accuracy:.2f} %", flush=True)
    net[3].reset_parameters()
    schedules = {"dense": constant(0.0), "sparse": bar(args.drop_rate, period=2)}
    for name, schedule in schedules.items():
        torch.manual_seed(1)
        accuracy = train(copy.deepcopy(net), 5, schedule, args.tune_epochs, args)
        print(f"digits 5 to 9, {name:6}  accuracy {accuracy:.2f} %", flush=True)


if __name__ == "__main__":
    main()
