"""A custom training loop with timm's parts: a small ResNet on digits, dense and sparse."""

import argparse
import time
from collections.abc import Sequence

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from ssprop_fx import SparsityScheduler, bar, constant, report, ssprop_compile


def load_data(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images [N, 1, size, size] and classes, 4/5 for training and 1/5 for test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size).to(memory_format=torch.channels_last)
    classes = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    split = len(images) * 4 // 5
    train, test = order[:split], order[split:]
    return images[train], classes[train], images[test], classes[test]


def train(scheduler: SparsityScheduler, args: argparse.Namespace) -> tuple[float, float]:
    """Train; return the test accuracy in percent and the seconds of training."""
    images, classes, test_images, test_classes = load_data(args.size)
    images, classes = images[: args.images], classes[: args.images]
    torch.manual_seed(0)
    torch.compiler.reset()
    net = timm.create_model(args.model, in_chans=1, num_classes=10)
    net = net.to(memory_format=torch.channels_last)
    model = ssprop_compile(net, scheduler, backend=args.backend)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    lr_scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        # Leave out a short last batch, which would cause a recompilation.
        whole = len(images) // args.batch_size * args.batch_size
        for batch in torch.randperm(len(images))[:whole].split(args.batch_size):
            loss = criterion(model(images[batch]), classes[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        lr_scheduler.step(epoch + 1)
    seconds = time.perf_counter() - start
    if report(model).sites:
        print(report(model))
    model.eval()
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_classes).float().mean()
    return 100 * right.item(), seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Train dense and sparse, and print both accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="size of the images, in pixels")
    parser.add_argument("--images", type=int, default=None, help="training images (default: all)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    parser.add_argument("--drop-rate", type=float, default=0.8, help="drop rate of sparse epochs")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    steps = len(load_data(1)[0][: args.images]) // args.batch_size
    schedules = {"dense": constant(0.0), "sparse": bar(args.drop_rate, period=2 * steps)}
    for name, schedule in schedules.items():
        accuracy, seconds = train(SparsityScheduler(schedule), args)
        print(
            f"{name:6}  accuracy {accuracy:.2f} %  {seconds:.1f} s, compiling included", flush=True
        )


if __name__ == "__main__":
    main()
