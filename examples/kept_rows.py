"""Processes that share their selection send only the kept rows of their gradients.

    torchrun --nproc_per_node 2 examples/kept_rows.py --model resnet18 --drop-rate 0.8

Prints the bytes that a sparse step sends, compared with DDP's plain all-reduce, and whether the
averaged gradients are equal. It uses AOT eager, because it counts bytes and does not measure time.
"""

import argparse

import timm
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ssprop_fx import SparsityConfig, SparsityScheduler, constant, ssprop_compile
from ssprop_fx.integrations.ddp import KeptRows, kept_rows_hook


def gradients_of_a_step(args: argparse.Namespace, kept_rows: KeptRows | None) -> list[torch.Tensor]:
    """Return the averaged gradients of one step."""
    torch.manual_seed(0)
    model = timm.create_model(args.model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in model.parameters():
            # Some parameters start at zero, which makes the gradients of earlier layers zero.
            parameter += 0.02 * torch.randn_like(parameter)
    config = SparsityConfig(ranks="shared", gate=False)
    scheduler = SparsityScheduler(constant(args.drop_rate))
    compiled = ssprop_compile(model, scheduler, config=config, backend="aot_eager")
    ddp = DistributedDataParallel(compiled)
    if kept_rows is not None:
        ddp.register_comm_hook(kept_rows, kept_rows_hook)
    # From here on, each rank has its own samples.
    torch.manual_seed(1 + distributed.get_rank())
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size)
    labels = torch.randint(1000, (args.batch_size,))
    nn.functional.cross_entropy(ddp(images), labels).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def main() -> None:
    """Run one step without the hook and one with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--drop-rate", type=float, default=0.8)
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args()
    distributed.init_process_group("gloo")
    kept_rows = KeptRows()
    plain = gradients_of_a_step(args, None)
    packed = gradients_of_a_step(args, kept_rows)
    if distributed.get_rank() == 0:
        share = kept_rows.sent_bytes / kept_rows.dense_bytes
        print(
            f"{args.model} at drop rate {args.drop_rate:g}, {distributed.get_world_size()} ranks:"
            f" {kept_rows.sent_bytes / 1e6:.1f} MB of {kept_rows.dense_bytes / 1e6:.1f} MB a step"
            f" ({share:.3f}); gradients equal bit for bit:"
            f" {all(map(torch.equal, plain, packed))}"
        )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
