"""`python -m benchmarks gpu-pack`: what travels beside the repository to a machine without network.

Writes wheels of the packages that such a machine may lack, and CIFAR-10 if it is given; then shows
what everything weighs.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.cifar import pack
from benchmarks.machine import commit
from benchmarks.results import table

__all__ = ["LIMIT_MIB", "Part", "add_parser", "weigh"]

LIMIT_MIB = 64
# Beside torch, torchvision and the usual scientific packages.
_PACKAGES = ("timm",)
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """A part of what travels.

    Attributes:
        part: what it is.
        mib: its size.
    """

    part: str
    mib: float


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add this command to the command line."""
    parser = subparsers.add_parser(
        "gpu-pack",
        help="what travels to a GPU machine without network",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for what travels")
    parser.add_argument("--data", type=Path, metavar="ZIP", help="CIFAR-10, for `gpu-study`")
    parser.add_argument("--python", default="3.12", help="Python of that machine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Pack, and print sizes and the commands to run there.

    Raises:
        SystemExit: it weighs more than `LIMIT_MIB`.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    _download(args.output / "wheels", args.python)
    if args.data:
        pack(args.data, args.output / "cifar10.pt")
    parts = weigh(args.output)
    print(table(parts, {"part": "", "mib": ".1f"}))
    print(f"\n{_commands(args.output, bool(args.data))}")
    if parts[-1].mib > LIMIT_MIB:
        sys.exit(f"this is more than {LIMIT_MIB} MiB")


def weigh(folder: Path) -> list[Part]:
    """Return the size of the repository, of each entry of a folder, and of all together.

    Args:
        folder: what travels beside the repository. Results of an earlier run, with their compile
            cache, may lie there too.
    """
    listed = subprocess.run(
        ["git", "-C", str(_ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [_ROOT / name for name in listed.split("\0") if name]
    repository = sum(path.stat().st_size for path in paths if path.is_file())
    parts = [Part("repository", repository / 2**20)]
    parts += [Part(path.name, _size(path) / 2**20) for path in sorted(folder.iterdir())]
    return [*parts, Part("together", sum(part.mib for part in parts))]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _download(folder: Path, python: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
    subprocess.run([*command, *_PACKAGES], check=True)


def _commands(folder: Path, has_data: bool) -> str:
    site = folder / "site"
    lines = [
        f"python3 -m pip install --no-index --no-deps --target {site} {folder / 'wheels'}/*.whl",
        f"export PYTHONPATH=.:passes:{site} BENCHMARK_COMMIT={commit()}",
        f"python3 -m benchmarks gpu --minutes 10 {_where(folder / 'results')}",
    ]
    if has_data:
        data = folder / "cifar10.pt"
        where = _where(folder / "study")
        lines.append(f"python3 -m benchmarks gpu-study --minutes 10 --data {data} {where}")
    return "\n".join(lines)


def _where(results: Path) -> str:
    """Go on with the results of an earlier run if they travel along, with their compile cache."""
    return f"{'--resume' if results.exists() else '--output'} {results}"
