"""ADD_WINDOWS: adds windows of a signal up at the positions of winners, row by row.

    ssprop::add_windows(v, weight, winners, length, stride, padding, dilation) -> grad_input

On a CPU, Inductor's scatter adds every number by itself. A window is a contiguous row if the
channels of the input are innermost, and ATen adds rows as vectors. Windows that start `stride`
apart may overlap; those of one *phase* do not:

    stride 2, kernel 3    windows 0, 2, 4 are phase 0, windows 1, 3, 5 are phase 1
"""

import torch
from torch import Tensor

__all__ = ["ADD_WINDOWS"]

_library = torch.library.Library("ssprop", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "add_windows(Tensor v, Tensor weight, Tensor winners, SymInt length, int stride, int padding,"
    " int dilation) -> Tensor"
)


def _add_windows(
    v: Tensor,
    weight: Tensor,
    winners: Tensor,
    length: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    size, channels = v.shape
    _, c_in, kernel = weight.shape
    span = (kernel - 1) * dilation + 1
    # Sums of many windows need the precision.
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = weight.new_zeros(channels, span, c_in, dtype=wide)
    rows[:, ::dilation] = weight.transpose(1, 2)
    phases = -(-span // stride)
    block = phases * stride
    windows = (length + 2 * padding - span) // stride + 1
    blocks = -(-windows // phases)
    # Windows of the last blocks may not exist; no winner is among them.
    room = max(length + 2 * padding, (phases - 1) * stride + blocks * block)
    out = v.new_zeros(size, room, c_in, dtype=wide)
    for n in range(size):
        for phase in range(phases):
            chosen = (winners[n] % phases == phase).nonzero()[:, 0]
            start = phase * stride
            of_phase = out[n, start : start + blocks * block].view(blocks, block * c_in)
            added = (rows[chosen] * v[n, chosen, None, None]).flatten(1)
            at = winners[n, chosen].div(phases, rounding_mode="floor")
            of_phase[:, : span * c_in].index_add_(0, at, added)
    return out[:, padding : padding + length].to(v.dtype).contiguous().transpose(1, 2)


def _fake(
    v: Tensor,
    weight: Tensor,
    winners: Tensor,
    length: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    return v.new_empty(v.shape[0], length, weight.shape[1]).transpose(1, 2)


_library.impl("add_windows", _add_windows, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("ssprop::add_windows", _fake, lib=_library)

ADD_WINDOWS = torch.ops.ssprop.add_windows.default
