"""Images in memory, and the batches that all rows of a seed share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

__all__ = ["Images", "load_images"]

# Training images are stored this much larger than they are used, for random crops.
_MARGIN = 1.15


@dataclass(frozen=True)
class Images:
    """Images of one split.

    Attributes:
        pixels: uint8 [M, 3, H, W].
        labels: int64 [M].
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int | None) -> "Images":
        """Return this many random images, always the same; all of them for None."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count]
        return Images(self.pixels[chosen], self.labels[chosen])

    def crops(self, indices: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return random crops, half of them mirrored, of these images: float32 [n, 3, size, size].

        Args:
            indices: int64 [n].
            size: height and width in pixels.
            generator: draws two offsets and a mirror for each image.
        """
        free = self.pixels.shape[-1] - size
        draws = torch.rand(len(indices), 3, generator=generator)
        crops = []
        for index, (down, right, mirror) in zip(indices.tolist(), draws.tolist(), strict=True):
            top, left = int(down * (free + 1)), int(right * (free + 1))
            crop = self.pixels[index, :, top : top + size, left : left + size]
            crops.append(crop.flip(-1) if mirror < 0.5 else crop)
        return _scale(torch.stack(crops))

    def batches(self, size: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images in order, cropped at the centre, with their labels."""
        top = (self.pixels.shape[-1] - size) // 2
        centre = self.pixels[..., top : top + size, top : top + size]
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield _scale(centre[part]), self.labels[part]


def load_images(folder: Path, size: int, cache: Path, pad: int = 0) -> Images:
    """Return the images of a folder of classes, from a cache if they were read before.

    Args:
        folder: `CLASS/NAME`.
        size: height and width in pixels at which they will be used.
        cache: folder of the cache.
        pad: pixels of reflection around each image; 0 resizes them to be larger instead.
    """
    path = cache / f"{folder.parent.name}-{folder.name}-{size}-{pad}.pt"
    if path.exists():
        return Images(*torch.load(path))
    side = size if pad else round(size * _MARGIN)
    steps: list[v2.Transform] = [v2.PILToTensor(), v2.Resize(side, antialias=True)]
    steps.append(v2.CenterCrop(side))
    if pad:
        steps.append(v2.Pad(pad, padding_mode="reflect"))
    data = ImageFolder(str(folder), v2.Compose(steps))
    pixels, labels = zip(*data, strict=True)
    images = Images(torch.stack(pixels), torch.tensor(labels))
    cache.mkdir(parents=True, exist_ok=True)
    torch.save((images.pixels, images.labels), path)
    return images


def _scale(pixels: Tensor) -> Tensor:
    scaled = pixels.float().div_(127.5).sub_(1)
    return scaled.contiguous(memory_format=torch.channels_last)
