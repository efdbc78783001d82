"""The marker: where in a graph the backward of the kept samples begins, and of which choice.

    ssprop::kept_samples(gradient, choice) -> gradient

The joint graph gets the marker before the partition, so that the backward keeps `choice`, a number
that says which forward the backward belongs to. `slice_backward` removes it again. If something
else compiled the backward, the marker raises an error: no backward is dense in silence.
"""

import torch
from torch import Tensor

from ssprop_passes.errors import SsPropCompileError

__all__ = ["MARKER"]

_library = torch.library.Library("ssprop", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "kept_samples(Tensor gradient, Tensor choice) -> Tensor"
)


def _not_sliced(gradient: Tensor, choice: Tensor) -> Tensor:
    raise SsPropCompileError(
        "a backward of the kept samples ran without its compiler: compiled autograd does not work"
        ' with axis="sample", turn it off or use axis="channel"'
    )


def _fake(gradient: Tensor, choice: Tensor) -> Tensor:
    return torch.empty_like(gradient)


_library.impl(  # type: ignore[no-untyped-call]
    "kept_samples", _not_sliced, "CompositeExplicitAutograd"
)
torch.library.register_fake("ssprop::kept_samples", _fake, lib=_library)

MARKER = torch.ops.ssprop.kept_samples.default
