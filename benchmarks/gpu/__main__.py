"""`python -m benchmarks.gpu STAGE --output FOLDER`: one stage in this process."""

import argparse
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.study import SEEDS

_ALL = {stage.name: stage for stage in (*STAGES, *SEEDS)}


def main() -> None:
    """Run the stage of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("stage", choices=list(_ALL))
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models and few rounds")
    parser.add_argument("--data", type=Path, help="CIFAR-10, as `gpu-pack` writes it")
    args = parser.parse_args()
    machine.allocator()
    # As training scripts do for a fixed shape: the dense step gets its fastest kernels.
    torch.backends.cudnn.benchmark = True
    # Every variant recompiles the same code, and none may silently fall back to eager.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    settings = Settings(args.device, args.tiny, args.output, args.data)
    _ALL[args.stage].run(settings, args.stage)


if __name__ == "__main__":
    main()
