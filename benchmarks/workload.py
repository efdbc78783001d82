"""The measured workload: a model, its input, and its training step."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import timm
import torch
from torch import Tensor, nn

from ssprop_fx.compiler.backend import BACKENDS

__all__ = ["Workload", "add_workload_arguments", "workload_of"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A timm model at a resolution, batch size, precision and memory layout.

    Attributes:
        model: name of the timm model.
        batch_size: images in a batch.
        img_size: their height and width, in pixels.
        amp: use bfloat16 autocast instead of float32.
        contiguous: use contiguous memory layout instead of channels_last.
        device: device, such as `"cpu"`.
        backend: backend of `torch.compile`, `"inductor"` or `"aot_eager"`.
    """

    model: str
    batch_size: int
    img_size: int
    amp: bool = False
    contiguous: bool = False
    device: str = "cpu"
    backend: str = "inductor"

    @property
    def title(self) -> str:
        """A title such as `resnet18 64 b64 fp32 channels_last`."""
        return (
            f"{self.model} {self.img_size} b{self.batch_size}"
            f" {'bf16 autocast' if self.amp else 'fp32'}"
            f" {'contiguous' if self.contiguous else 'channels_last'}"
        )

    @property
    def slug(self) -> str:
        """The title as part of a file name."""
        return self.title.replace(" ", "-").replace("/", "_")

    def at(self, batch_size: int, img_size: int) -> "Workload":
        """Return the workload at another batch size and resolution."""
        return replace(self, batch_size=batch_size, img_size=img_size)

    def build(self) -> tuple[nn.Module, Tensor]:
        """Return the model in train mode, with weights from seed 0, and a batch [N, 3, H, W]."""
        torch.manual_seed(0)
        layout = torch.contiguous_format if self.contiguous else torch.channels_last
        # Transformers need the resolution; convolutional models accept any.
        try:
            model = timm.create_model(self.model, img_size=self.img_size)
        except TypeError:
            model = timm.create_model(self.model)
        images = torch.randn(self.batch_size, 3, self.img_size, self.img_size, device=self.device)
        model = model.to(self.device, memory_format=layout).train()
        return model, images.to(memory_format=layout)

    def losses(self, module: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Run the forward; return a loss for each image, [N], that depends on every output."""
        device_type = torch.device(self.device).type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.amp):
            output = module(images)
        return output.float().logsumexp(1)

    def step(self, module: Callable[[Tensor], Tensor], images: Tensor) -> None:
        """Run forward and backward."""
        self.losses(module, images).mean().backward()


def add_workload_arguments(
    parser: argparse.ArgumentParser, model: str | None = "resnet18", size: int = 64
) -> None:
    """Add the arguments that `workload_of` reads.

    Args:
        parser: the parser.
        model: default model; None adds no `--model`.
        size: default batch size and resolution.
    """
    if model:
        parser.add_argument("--model", default=model, help=f"timm model (default: {model})")
    parser.add_argument("--batch-size", type=int, default=size)
    parser.add_argument("--img-size", type=int, default=size)
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--contiguous", action="store_true", help="not channels_last")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])


def workload_of(args: argparse.Namespace, model: str | None = None) -> Workload:
    """Return the workload of the command line, with `model` instead of `--model` if given."""
    return Workload(
        model=model or args.model,
        batch_size=args.batch_size,
        img_size=args.img_size,
        amp=args.amp,
        contiguous=args.contiguous,
        device=args.device,
        backend=args.backend,
    )
