"""A diffusion model of digits (DDPM, with diffusers' UNet2DModel), dense and sparse."""

import argparse
import time
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssprop_fx import SparsityScheduler, bar, constant, ssprop_compile


def load_data() -> tuple[Tensor, Tensor]:
    """Return training images (4/5) and test images (1/5), [N, 1, 8, 8] in [-1, 1]."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return images[: len(images) * 4 // 5], images[len(images) * 4 // 5 :]


def denoising_loss(model: nn.Module, noising: DDPMScheduler, images: Tensor) -> Tensor:
    """Return the mean squared error of the model's estimate of the noise."""
    noise = torch.randn_like(images)
    times = torch.randint(noising.config.num_train_timesteps, (len(images),))
    noised = noising.add_noise(images, noise, times)
    return nn.functional.mse_loss(model(noised, times, return_dict=False)[0], noise)


def train(scheduler: SparsityScheduler, args: argparse.Namespace) -> tuple[float, float]:
    """Train; return the loss on the test images and the seconds of training."""
    torch.manual_seed(0)
    torch.compiler.reset()
    images, test_images = load_data()
    images = images[: args.images]
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(args.width, 2 * args.width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    noising = DDPMScheduler(num_train_timesteps=args.timesteps)
    model = ssprop_compile(unet, scheduler, backend=args.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    start = time.perf_counter()
    for _ in range(args.epochs):
        whole = len(images) // args.batch_size * args.batch_size
        for batch in torch.randperm(len(images))[:whole].split(args.batch_size):
            denoising_loss(model, noising, images[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    seconds = time.perf_counter() - start
    model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        return denoising_loss(model, noising, test_images).item(), seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Train dense and sparse, and print both losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=None, help="training images (default: all)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--width", type=int, default=64, help="channels of the first block")
    parser.add_argument("--timesteps", type=int, default=200)
    parser.add_argument("--drop-rate", type=float, default=0.8, help="drop rate of sparse epochs")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "aot_eager"])
    args = parser.parse_args(argv)
    steps = len(load_data()[0][: args.images]) // args.batch_size
    schedules = {"dense": constant(0.0), "sparse": bar(args.drop_rate, period=2 * steps)}
    for name, schedule in schedules.items():
        loss, seconds = train(SparsityScheduler(schedule), args)
        print(f"{name:6}  test loss {loss:.4f}  {seconds:.1f} s, compiling included", flush=True)


if __name__ == "__main__":
    main()
