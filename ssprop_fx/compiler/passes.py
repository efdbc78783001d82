"""The passes that a sparse graph goes through, in order."""

from collections.abc import Sequence
from typing import Any

from ssprop_passes.graph.graph_pass import PassList
from ssprop_passes.graph.rewrite import inductor_decompositions
from ssprop_passes.transforms.batch_norm import BatchNormGradientPass
from ssprop_passes.transforms.depthwise_layout import DepthwiseLayoutPass
from ssprop_passes.transforms.patches import PatchPass
from ssprop_passes.transforms.sparse_backward import SparseBackwardPass
from ssprop_passes.transforms.two_step_sums import TwoStepSumsPass

__all__ = ["build_passes"]


def build_passes(
    sparse: SparseBackwardPass, patches: PatchPass | None, kind: str, user_hooks: Sequence[Any] = ()
) -> PassList:
    """Return all passes on the joint graph as one.

    Args:
        sparse: makes the sites of the graph sparse.
        patches: takes gradients of 1x1 convolutions from patches; None without patches.
        kind: the compiler, `"inductor"` or `"aot_eager"`. AOT eager is not for speed, so it runs
            only these two.
        user_hooks: the user's passes in Inductor's `joint_custom_pre_pass`.
    """
    passes = [sparse] if patches is None else [sparse, patches]
    if kind != "inductor":
        return PassList(passes)
    return PassList(
        [
            *user_hooks,
            *passes,
            # After the passes that leave layers out of the same convolutions.
            DepthwiseLayoutPass(),
            # It rewrites scores and gathers that the sparse pass inserted.
            BatchNormGradientPass(inductor_decompositions),
            # Last, because the previous pass looks for sums that this one splits.
            TwoStepSumsPass(),
        ]
    )
