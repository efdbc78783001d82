"""Random single layers: their sparse backward by the packages, and by an oracle.

`python tests/support/layer_cases.py 10000` checks that many cases against the oracle; each run
draws new ones.
"""

import sys
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import keep_count, mask_channels
from ssprop_passes.replacements.conv import ConvGeometry, sparse_conv_backward
from ssprop_passes.replacements.linear import sparse_linear_backward
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class ConvCase:
    """A convolution; tuples have one entry per spatial dimension."""

    batch: int
    size: tuple[int, ...]
    inputs_of_group: int
    channels_of_group: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    channels_last: bool
    dtype: torch.dtype
    drop_rate: float
    output_mask: tuple[bool, bool, bool]
    seed: int

    @property
    def channels(self) -> int:
        return self.channels_of_group * self.groups

    @property
    def selection_groups(self) -> int:
        return 1 if self.inputs_of_group == 1 else self.groups

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias."""
        generator = torch.Generator().manual_seed(self.seed)
        inputs = self.inputs_of_group * self.groups
        weight_shape = (
            (inputs, self.channels_of_group)
            if self.transposed
            else (self.channels, self.inputs_of_group)
        )
        shapes = ((self.batch, inputs, *self.size), (*weight_shape, *self.kernel), (self.channels,))
        tensors = [torch.randn(s, dtype=self.dtype, generator=generator) for s in shapes]
        if self.channels_last and len(self.size) == 2:
            tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        return tuple(tensors)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        name = f"conv{'_transpose' if self.transposed else ''}{len(self.size)}d"
        kwargs = {"output_padding": self.output_padding} if self.transposed else {}
        return getattr(functional, name)(
            x,
            weight,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            **kwargs,
        )

    def keep_count(self) -> int:
        return keep_count(self.channels // self.selection_groups, self.drop_rate)

    def sparse(self, grad_output: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        geometry = ConvGeometry(
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )
        return sparse_conv_backward(
            grad_output, x, weight, self.keep_count(), geometry, self.output_mask
        )

    @property
    def channel_dim(self) -> int:
        return 1


@dataclass(frozen=True)
class LinearCase:
    """A linear layer."""

    rows: int
    features: int
    channels: int
    dtype: torch.dtype
    drop_rate: float
    output_mask: tuple[bool, bool, bool]
    seed: int
    selection_groups: int = 1
    channel_dim: int = 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = ((self.rows, self.features), (self.channels, self.features), (self.channels,))
        return tuple(torch.randn(s, dtype=self.dtype, generator=generator) for s in shapes)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x, weight, bias)

    def sparse(self, grad_output: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        k = keep_count(self.channels, self.drop_rate)
        return sparse_linear_backward(grad_output, x, weight, k, self.output_mask)


Case = ConvCase | LinearCase
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def is_near_tie(case: Case, grad_output: Tensor) -> bool:
    """Say whether rounding decides between the weakest kept and the strongest dropped channel."""
    of_group = case.channels // case.selection_groups
    k = keep_count(of_group, case.drop_rate)
    if k == of_group:
        return False
    scores = grad_output.double().transpose(0, 1).flatten(1).norm(dim=1)
    kept, left = scores.view(-1, of_group).sort(descending=True).values[:, k - 1 : k + 1].T
    return bool((kept - left < 8 * torch.finfo(case.dtype).eps * kept).any())


def check(case: Case) -> None:
    """Compare the sparse gradients of a case with the dense ones of the masked grad_output.

    The sum of the products' magnitudes bounds the rounding error of a sum of products (Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1). The error is measured against that
    bound, because the sum itself may cancel.
    """
    tensors = [t.requires_grad_() for t in case.tensors()]
    output = case.forward(*tensors)
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad_output = torch.randn(output.shape, dtype=case.dtype, generator=generator)
    if output.is_contiguous(memory_format=torch.channels_last) if output.ndim == 4 else False:
        grad_output = grad_output.to(memory_format=torch.channels_last)
    assume(not is_near_tie(case, grad_output))
    masked = mask_channels(grad_output, case.drop_rate, case.selection_groups, case.channel_dim)
    expected = torch.autograd.grad(output, tensors, masked)
    absolute = [t.detach().abs().requires_grad_() for t in tensors]
    magnitudes = torch.autograd.grad(case.forward(*absolute), absolute, masked.abs())
    with torch.no_grad():
        actual = case.sparse(grad_output, *tensors[:2])
    for got, want, magnitude, is_wanted in zip(
        actual, expected, magnitudes, case.output_mask, strict=True
    ):
        assert (got is not None) == is_wanted
        if got is not None:
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            assert (got - want).norm() <= TOLERANCE[case.dtype] * magnitude.norm()


DROP_RATES = st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.95])
DTYPES = st.sampled_from([torch.float64, torch.float32])
MASKS = st.tuples(st.booleans(), st.booleans(), st.booleans())
SEEDS = st.integers(0, 2**31)


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    dims = draw(st.integers(1, 3))

    def per_dim(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, padding, stride = per_dim(1, 3), per_dim(1, 2), per_dim(0, 2), per_dim(1, 3)
    transposed = draw(st.booleans())
    # Large enough for one output position; a transposed convolution's output must be positive.
    size = tuple(
        draw(st.integers(1, 6)) + (2 * p + 1 if transposed else d * (k - 1))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    return ConvCase(
        batch=draw(st.integers(1, 3)),
        size=size,
        inputs_of_group=draw(st.sampled_from([1, 1, 2, 3])),
        channels_of_group=draw(st.integers(1, 6)),
        groups=draw(st.sampled_from([1, 1, 2, 4])),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        output_padding=tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
        if transposed
        else (0,) * dims,
        transposed=transposed,
        channels_last=draw(st.booleans()),
        dtype=draw(DTYPES),
        drop_rate=draw(DROP_RATES),
        output_mask=draw(MASKS),
        seed=draw(SEEDS),
    )


LINEAR_CASES = st.builds(
    LinearCase,
    rows=st.integers(1, 9),
    features=st.integers(1, 9),
    channels=st.integers(1, 20),
    dtype=DTYPES,
    drop_rate=DROP_RATES,
    output_mask=MASKS,
    seed=SEEDS,
)
CASES = st.one_of(conv_cases(), conv_cases(), LINEAR_CASES)


# Hypothesis remembers every case that it tried: more of them at once need too much memory.
AT_ONCE = 10_000


def run(count: int) -> None:
    """Check `count` random cases."""
    quiet = list(HealthCheck)
    for first in range(0, count, AT_ONCE):
        part = min(AT_ONCE, count - first)
        settings(max_examples=part, deadline=None, suppress_health_check=quiet, database=None)(
            given(CASES)(check)
        )()


if __name__ == "__main__":
    run(int(sys.argv[1]))
    print(f"{sys.argv[1]} cases, none failing")
