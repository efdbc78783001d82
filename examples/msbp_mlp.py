"""Memorized sparse back-propagation (Zhang et al., arXiv 1905.10194) of an MLP.

It trains on the pixels of scikit-learn's digits, or with --data-dir on features of a folder of
images such as CIFAR-10 (train/<class>/*.jpg and test/<class>/*.jpg).
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile


class Data(NamedTuple):
    """Inputs [N, features] and classes [N], for training and for test."""

    inputs: Tensor
    classes: Tensor
    test_inputs: Tensor
    test_classes: Tensor


def load_digits_pixels(seed: int) -> Data:
    """Return the 64 pixels of each digit: 4/5 of the images for training, 1/5 for test."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    classes = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    split = len(images) * 4 // 5
    train, test = order[:split], order[split:]
    return Data(images[train], classes[train], images[test], classes[test])


def load_images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return images [count, 3, 32, 32] and their classes; each class has a folder."""
    transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    dataset = ImageFolder(folder, transform)
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    images, classes = zip(*(dataset[index] for index in chosen.tolist()), strict=True)
    return torch.stack(images), torch.tensor(classes)


def load_patch_features(folder: Path, count: int, filters: int = 128) -> Data:
    """Return features of `count` images in folder/train and `count // 5` images in folder/test.

    The features are those of Coates, Lee and Ng (AISTATS 2011) with random patches as filters:
    responses to whitened 6 x 6 patches of the training images, both signs, averaged over a grid of
    3 x 3.
    """
    generator = torch.Generator().manual_seed(0)
    images, classes = load_images(folder / "train", count)
    test_images, test_classes = load_images(folder / "test", count // 5)
    some = images[torch.randperm(len(images), generator=generator)[:1000]]
    patches = nn.functional.unfold(some, 6, stride=5).transpose(1, 2).flatten(0, 1)
    center = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - center).T.cov())
    whiten = vectors @ torch.diag((values + 0.01).rsqrt()) @ vectors.T
    chosen = patches[torch.randperm(len(patches), generator=generator)[:filters]]
    whitened = nn.functional.normalize((chosen - center) @ whiten)
    weight = whitened @ whiten

    def features(images: Tensor) -> Tensor:
        response = nn.functional.conv2d(images, weight.view(-1, 3, 6, 6), -weight @ center)
        both = torch.cat([response.relu(), (-response).relu()], 1)
        return nn.functional.adaptive_avg_pool2d(both, 3).flatten(1)

    train, test = (
        torch.cat([features(part) for part in all_images.split(500)])
        for all_images in (images, test_images)
    )
    mean, deviation = train.mean(0), train.std(0)
    return Data((train - mean) / deviation, classes, (test - mean) / deviation, test_classes)


def train(
    data: Data, seed: int, drop_rate: float, memory: float, args: argparse.Namespace
) -> tuple[float, float]:
    """Train; return the test accuracy in percent and the seconds of an epoch."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    widths = [data.inputs.shape[1], *[args.hidden] * args.layers]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    classifier = nn.Linear(args.hidden, int(data.classes.max()) + 1)
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
        # Leave out a short last batch, which would cause a recompilation.
        whole = len(data.inputs) // args.batch_size * args.batch_size
        for batch in torch.randperm(len(data.inputs))[:whole].split(args.batch_size):
            loss = nn.functional.cross_entropy(model(data.inputs[batch]), data.classes[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        epochs.append(time.perf_counter() - start)
    model.eval()
    with torch.no_grad():
        right = (model(data.test_inputs).argmax(1) == data.test_classes).float().mean()
    # Leave out the first epoch, which compiles.
    return 100 * right.item(), statistics.median(epochs[1:] or epochs)


def main(argv: Sequence[str] | None = None) -> None:
    """Train each method with each seed and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="folder of images to use instead of digits")
    parser.add_argument("--images", type=int, default=10000, help="training images of --data-dir")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=500, help="units of a hidden layer")
    parser.add_argument("--layers", type=int, default=2, help="hidden layers")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--drop-rate", type=float, default=0.96)
    parser.add_argument("--memory", type=float, nargs="+", default=[0.5, 0.9], help="eta of MSBP")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    images = load_patch_features(args.data_dir, args.images) if args.data_dir else None
    methods = {"dense": (0.0, 0.0), "SBP": (args.drop_rate, 0.0)}
    methods |= {f"MSBP, eta {eta:g}": (args.drop_rate, eta) for eta in args.memory}
    print(f"{'method':16} {'accuracy %':>10} {'sd':>5} {'ms an epoch':>12}")
    for name, (drop_rate, memory) in methods.items():
        runs = []
        for seed in range(args.seeds):
            data = load_digits_pixels(seed) if images is None else images
            runs.append(train(data, seed, drop_rate, memory, args))
        accuracies, seconds = zip(*runs, strict=True)
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        mean, time_ms = statistics.mean(accuracies), 1e3 * statistics.median(seconds)
        print(f"{name:16} {mean:10.2f} {spread:5.2f} {time_ms:12.1f}", flush=True)


if __name__ == "__main__":
    main()
