"""The marker: where in a graph the backward of the kept samples begins, and of which choice.

    ssprop::kept_samples(gradient, choice) -> gradient

The joint graph gets the marker before the partition, so that the backward keeps `choice`, a number
that says which forward the backward belongs to. `slice_backward` removes it again. If something
else compiled the backward, the marker raises an error: no backward is dense in silence.

    ssprop::sample_weights(gradient, choice, entries) -> [N]

stands for the weights of the samples over their mean. `gradient` has this many entries a sample in
its first dimension. `slice_backward` makes it an input.
"""

import torch
from torch import Tensor

from ssprop_passes.errors import SsPropCompileError

__all__ = ["MARKER", "WEIGHTS"]

_library = torch.library.Library("ssprop", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "kept_samples(Tensor gradient, Tensor choice) -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "sample_weights(Tensor gradient, Tensor choice, SymInt entries) -> Tensor"
)


def _not_sliced(gradient: Tensor, choice: Tensor, entries: int = 1) -> Tensor:
    raise SsPropCompileError(
        "a backward of the kept samples ran without its compiler: compiled autograd does not work"
        ' with axis="sample", turn it off or use axis="channel"'
    )


def _fake(gradient: Tensor, choice: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _fake_weights(gradient: Tensor, choice: Tensor, entries: int) -> Tensor:
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.new_empty([gradient.shape[0] // entries], dtype=wide)


for _name, _of in (("kept_samples", _fake), ("sample_weights", _fake_weights)):
    _library.impl(  # type: ignore[no-untyped-call]
        _name, _not_sliced, "CompositeExplicitAutograd"
    )
    torch.library.register_fake(f"ssprop::{_name}", _of, lib=_library)

MARKER = torch.ops.ssprop.kept_samples.default
WEIGHTS = torch.ops.ssprop.sample_weights.default
