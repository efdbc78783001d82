"""A stage, and what it is told: the device, the size of the rehearsal, where results go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import environment
from benchmarks.results import save
from benchmarks.workload import Workload

__all__ = ["Settings", "Stage"]

# Small models of the same kinds, for a rehearsal on a CPU.
_TINY = {
    "convnext_tiny": "test_convnext",
    "efficientnet_b0": "test_efficientnet",
    "vit_small_patch16_224": "test_vit",
}
# Bytes of memory that a batch of 256 needs at 224 x 224, with room for the larger models.
_LARGE = 40 * 2**30


@dataclass(frozen=True)
class Settings:
    """How stages run.

    Attributes:
        device: type of the device, `"cuda"` or `"cpu"`.
        is_tiny: whether this is a rehearsal: small models, few rounds.
        folder: folder of the results.
        data: CIFAR-10 as `gpu-pack` writes it; None if no stage needs it.
    """

    device: str
    is_tiny: bool
    folder: Path
    data: Path | None = None

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def rounds(self) -> int:
        """Timed steps of each row."""
        return 2 if self.is_tiny else 15

    def workload(self, model: str, batch_size: int, backend: str = "aot_eager") -> Workload:
        """Return the workload of a model, in bf16 autocast and channels_last, at 224 x 224.

        Args:
            model: name of the timm model.
            batch_size: images in a batch; a GPU of less than 40 GiB gets a quarter of them.
            backend: compiler of the rehearsal; everything else is compiled by Inductor.
        """
        if self.is_tiny:
            tiny = _TINY.get(model, "test_resnet")
            return Workload(
                model=tiny,
                batch_size=10,
                img_size=32,
                amp=True,
                device=self.device,
                backend=backend,
            )
        if self.is_cuda and torch.cuda.get_device_properties(0).total_memory < _LARGE:
            batch_size //= 4
        return Workload(
            model=model, batch_size=batch_size, img_size=224, amp=True, device=self.device
        )

    def save(self, rows: Sequence[Any], name: str) -> None:
        """Write rows as `gpu-NAME.json`; an earlier file of that name is replaced."""
        save(rows, environment(self.device), self.folder, f"gpu-{name}")


@dataclass(frozen=True)
class Stage:
    """A part of a run that has a process and a share of the time of its own.

    Attributes:
        name: its name, also of its files.
        seconds: its share of ten minutes.
        run: runs it; is given the settings and the name.
    """

    name: str
    seconds: int
    run: Callable[[Settings, str], None]
