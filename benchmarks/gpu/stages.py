"""The stages of `python -m benchmarks gpu`, the most telling first."""

from benchmarks.gpu import checks, facts, kernels, plans
from benchmarks.gpu.settings import Stage
from benchmarks.gpu.steps import CHANNELS, EAGER, SLICED, TWO_PASSES, StepStage

__all__ = ["STAGES"]


STAGES = (
    Stage("facts", 15, facts.run),
    Stage("gradients", 60, checks.run_gradients),
    Stage("resnet50", 165, StepStage("resnet50", 256, (SLICED, CHANNELS, TWO_PASSES, EAGER))),
    Stage("vit", 60, StepStage("vit_small_patch16_224", 256, (SLICED, CHANNELS))),
    Stage("convnext", 75, StepStage("convnext_tiny", 256, (SLICED, CHANNELS))),
    Stage("kernels", 60, kernels.run),
    Stage("efficientnet", 50, StepStage("efficientnet_b0", 256, (SLICED, CHANNELS))),
    Stage("regnety", 40, StepStage("regnety_016", 256, (SLICED, CHANNELS))),
    Stage("vgg", 25, StepStage("vgg16", 128, (SLICED, CHANNELS))),
    Stage("graphs", 20, StepStage("resnet50", 32, (CHANNELS,), modes=(None, "reduce-overhead"))),
    Stage("plans", 15, plans.run),
    Stage("tests", 15, checks.run_tests),
)
