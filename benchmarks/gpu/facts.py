"""Stage `facts`: what the device is, and what it reaches: copies, matrix products, launches."""

import platform
from dataclasses import dataclass
from importlib.metadata import version

import torch

from benchmarks.gpu.alone import alone
from benchmarks.gpu.events import elapsed_ms
from benchmarks.gpu.settings import Settings
from benchmarks.results import table

__all__ = ["Fact", "run"]

_LAUNCHES = 100


@dataclass(frozen=True)
class Fact:
    """One fact about the device or the software.

    Attributes:
        fact: what it is, with its unit.
        value: the value.
    """

    fact: str
    value: str


def run(settings: Settings, name: str) -> None:
    """Print and save the facts."""
    with alone():
        rows = [*_software(), *_hardware(settings), *_ceilings(settings)]
    print(table(rows, {"fact": "", "value": ""}))
    settings.save(rows, name)


def _software() -> list[Fact]:
    packages = ("torch", "triton", "timm")
    found = [Fact(name, version(name)) for name in packages]
    cudnn = str(torch.backends.cudnn.version())
    return [*found, Fact("python", platform.python_version()), Fact("cudnn", cudnn)]


def _hardware(settings: Settings) -> list[Fact]:
    if not settings.is_cuda:
        return []
    device = torch.cuda.get_device_properties(settings.device)
    return [
        Fact("device", device.name),
        Fact("compute capability", f"{device.major}.{device.minor}"),
        Fact("multiprocessors", str(device.multi_processor_count)),
        Fact("memory, GiB", f"{device.total_memory / 2**30:.1f}"),
    ]


def _ceilings(settings: Settings) -> list[Fact]:
    """Measure on random data: a matrix product of zeros can be faster."""
    device = settings.device
    count, size = (2**20, 256) if settings.is_tiny else (2**29, 8192)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copy_ms = elapsed_ms(lambda: target.copy_(source), device)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_ms = elapsed_ms(lambda: left @ right, device)
    small = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(_LAUNCHES):
            small.add_(1)

    launches_ms = elapsed_ms(launch, device)
    return [
        Fact("copy, GB/s read and written", f"{2 * 4 * count / copy_ms / 1e6:.0f}"),
        Fact("bf16 matrix product, TFLOP/s", f"{2 * size**3 / product_ms / 1e9:.1f}"),
        Fact("eager launch, us", f"{1e3 * launches_ms / _LAUNCHES:.1f}"),
    ]
