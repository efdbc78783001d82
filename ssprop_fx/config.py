"""SparsityConfig: what takes part in sparse back-propagation, and how it is chosen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.scores import SCORES, Score
from ssprop_passes.selection.selectors import SELECTORS, Selector, sampled
from torch import nn

from ssprop_fx.options import option, options_of

__all__ = ["TARGETS", "SparsityConfig"]

TARGETS = ("conv", "depthwise", "linear")


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Which layers take part in sparse back-propagation, and how channels or samples are chosen.

    Args:
        channel_multiple: keep counts are rounded to the nearest multiple of this: at least one
            multiple, at most all channels of the layer. `"auto"` is 8, and 16 in layers of 256
            channels or more, on every device. `1` means `max(int(share_kept * C), 1)` in each
            group, as the published code has it. Counts of samples are not rounded to it.
        min_channels: layers with fewer output channels stay dense.
        filter_fn: `filter_fn(module, fqn) -> bool` says whether a module takes part; `fqn` is its
            name in `model.named_modules()`. None lets every module take part, except the classifier
            of a timm model (`model.get_classifier()`).
        targets: the kinds of layer that take part: `"conv"`, `"depthwise"` (convolutions whose
            output channels read one input channel each) and `"linear"`.
        select: which channels, or samples, are kept, given their scores. `"topk"` keeps the
            largest, `"random"` keeps any. `"sampled"` draws them in proportion to their score, and
            weights them so that the expected gradients are the dense ones. Or your own function, as
            in the second example; `ssprop_passes.selection.selectors` describes it.
        axis: `"channel"`: each layer keeps some of its output channels. `"sample"`: the whole
            backward runs on some samples of the batch, `max(int(share_kept * N), 1)` of N. They are
            chosen once, by their gradients of the model's outputs. Then `targets`, `min_channels`
            and `filter_fn` matter only to layers in `rates`. `block`, `memory`, `gradients`,
            `specialize=True`, `ranks="shared"`, `score="l2_weight"` and `telemetry` do not work
            with `"sample"`. A rule, such as the controller `AddedNoise(0.1)` of the scheduler, may
            decide how many. See docs/schedules.md.
        score: what a channel, or a sample, is worth. `"l2"` is the l2 norm of its gradient, for
            channels nearly free behind a batch norm. `"mean_abs"` is the mean magnitude of its
            gradient, as in the published code. `"l2_weight"` is the l2 norm times the norm of the
            channel's row of the weight. Or your own function, as `ssprop_passes.selection.scores`
            describes.
        gradients: which gradients use the kept channels only: `"both"`, or just that of the
            `"weight"` or of the `"input"`. The other gradient is then dense and exact, and half of
            the FLOPs are saved. The bias follows the weight.
        block: experimental: in our measurements it did not pay. Keeps channels in blocks of this
            many neighbours, by the sum of their scores. Layers whose channels (per group) are no
            multiple of it stay dense.
        memory: experimental: in our measurements it did not pay. Adds this fraction, in [0, 1), of
            what the last sparse backward left out to the layer's output gradient (MSBP, arXiv
            1905.10194). The memory is a mean over the batch, so it assumes batches of one size and
            a loss that is a mean. It is state: save `model.ssprop.memory.state_dict()`. See
            docs/schedules.md.
        rates: name pattern -> drop rate in [0, 1), for layers that do not follow the schedule, such
            as `{"stem.*": 0, "layer4.*": 0.9}`. Patterns are those of `fnmatch`; the first that
            matches counts. A rate holds in every step whose scheduled drop rate is above 0. With
            `axis="sample"` these layers keep some of their channels too, inside the kept samples.
        saved: with `axis="sample"`, what the forward saves for the backward. `"all"`: all that the
            backward needs. `"kept"`: the inputs, batch statistics and random masks alone; the
            backward computes the rest again for the kept samples. This takes less memory and more
            time. The gradients are the same.
        patch: with `axis="sample"`: 1x1 convolutions of stride 1 take their gradients from averages
            over patches of this many positions a side, inside the kept samples (gradient
            filtering, CVPR 2023). 1 for no patches. The gradients are biased. Experimental: in our
            measurements it saved time and memory, and cost accuracy.
        gate: whether a layer whose sparse backward is not faster stays dense. Each layer is timed
            once, when it is compiled. A step whose layers would save less than a tenth of their
            time runs dense. False makes every layer sparse at every drop rate above 0. AOT eager,
            `axis="sample"` and `ranks="shared"` have no gate.
        specialize: whether each drop rate gets its own compile, with constant keep counts. This is
            a few percent faster at most, and CUDA graphs need it. `"auto"` does so for schedules of
            one or two drop rates above 0 if layers of one shape have one rate; True for up to six.
            False: one compile serves every drop rate. The gradients are the same.
        ranks: which channels the processes of a data-parallel run keep. `"own"`: each rank chooses
            by its own samples. `"shared"`: all ranks keep the channels that one process with the
            whole batch would keep. See docs/distributed.md.
        telemetry: whether sparse backwards record how much of each gradient they keep. A controller
            and `SparsityScheduler.telemetry` need it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.

    Examples:
        >>> config = SparsityConfig(filter_fn=lambda module, fqn: not fqn.startswith("stem"))
        >>> config.min_channels
        32

        Your own selector: half of the kept channels are the largest, the others are random.

        >>> import torch
        >>> from ssprop_fx import SparsityScheduler, constant, ssprop_compile
        >>> def half_topk(scores, k):
        ...     rank = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        ...     luck = torch.rand_like(scores, dtype=torch.float32)
        ...     return torch.topk(torch.where(rank < (k + 1) // 2, 2.0, luck), k).indices
        >>> config = SparsityConfig(select=half_topk, score="l2")
        >>> layer = nn.Linear(8, 64)
        >>> scheduler = SparsityScheduler(constant(0.75))
        >>> model = ssprop_compile(layer, scheduler, config=config, backend="aot_eager")
        >>> model(torch.randn(4, 8)).square().sum().backward()
        >>> int(layer.weight.grad.any(1).sum())
        16
    """

    channel_multiple: int | Literal["auto"] = option(
        "auto",
        help="Round keep counts to multiples of this number",
        unset="8, and 16 in layers of 256 channels or more",
        metavar="N",
        rule="at least 1",
        inspect=True,
    )
    min_channels: int = option(
        32,
        help="Leave layers with fewer output channels dense",
        rule="at least 1",
        inspect=True,
    )
    filter_fn: Callable[[nn.Module, str], bool] | None = option(
        None,
        help="Call this function to decide whether a module takes part",
        unset="all but the classifier of a timm model",
        metavar="(module, fqn) -> bool",
    )
    targets: tuple[str, ...] = option(
        TARGETS, help="Make these kinds of layer sparse", choices=TARGETS, inspect=True
    )
    select: str | Selector = option(
        "topk", help="Choose the kept channels or samples by this rule", choices=tuple(SELECTORS)
    )
    axis: Literal["channel", "sample"] = option(
        "channel", help="Keep some channels of each layer, or some samples of the batch"
    )
    score: str | Score = option(
        "l2", help="Rank channels or samples by this score", choices=tuple(SCORES)
    )
    gradients: Literal["both", "weight", "input"] = option(
        "both", help="Make these gradients sparse", inspect=True
    )
    block: int = option(
        1,
        help="Keep channels in blocks of this many neighbours;"
        " experimental: in our measurements it did not pay",
        rule="at least 1",
    )
    memory: float = option(
        0.0,
        help="Add this fraction of what the last sparse step left out;"
        " experimental: in our measurements it did not pay",
        rule="in [0, 1)",
    )
    rates: Mapping[str, float] = option(
        {},
        help="Give layers their own drop rate, by name pattern, such as 'layer4.*=0.9'",
        unset="all follow the schedule",
        example={"layer4.*": 0.9},
    )
    saved: Literal["all", "kept"] = option(
        "all",
        help="With samples: save all that the backward needs, or compute the kept samples again",
    )
    patch: int = option(
        1,
        help="With samples: average gradients of 1x1 convolutions over patches of this many"
        " positions a side; experimental: in our measurements it cost accuracy",
        rule="at least 1",
    )
    gate: bool = option(True, help="Leave a layer dense if its sparse backward is not faster")
    specialize: bool | Literal["auto"] = option(
        "auto",
        help="Compile once for each drop rate, with constant keep counts",
        unset="yes for one or two drop rates above 0",
        metavar="{yes,no,auto}",
    )
    ranks: Literal["own", "shared"] = option(
        "own", help="Let each process choose its own channels, or all share one choice"
    )
    telemetry: bool = option(False, help="Record how much of each gradient is kept")

    @property
    def selection(self) -> Selection:
        """How channels or samples are chosen, as the pass takes it."""
        return Selection(
            score=SCORES[self.score] if isinstance(self.score, str) else self.score,
            axis=self.axis,
            select=SELECTORS[self.select] if isinstance(self.select, str) else self.select,
            gradients=self.gradients,
            block=self.block,
            memory=float(self.memory),
        )

    def __post_init__(self) -> None:
        for known in options_of(SparsityConfig).values():
            known.check(getattr(self, known.name))
        if self.memory and self.selection.select is sampled:
            raise ValueError(
                'memory must be 0 with select="sampled", which is unbiased already: what it leaves'
                f" out adds up to nothing, and to add it again is noise; got {self.memory!r}"
            )
        _check_rates(self.rates)
        self._check_axis()
        # A copy, so that it stays as it was checked.
        object.__setattr__(self, "rates", dict(self.rates))

    def _check_axis(self) -> None:
        if self.axis == "channel":
            if self.saved != "all":
                raise ValueError(f'saved must be "all" with axis="channel", got {self.saved!r}')
            if self.patch > 1:
                raise ValueError(f'patch must be 1 with axis="channel", got {self.patch!r}')
            return
        for name, right, is_right in (
            ("block", "1", self.block == 1),
            ("memory", "0", not self.memory),
            ("specialize", 'False or "auto"', self.specialize is not True),
            ("ranks", '"own"', self.ranks == "own"),
            ("gradients", '"both"', self.gradients == "both"),
            ("score", '"l2", "mean_abs" or a function', self.score != "l2_weight"),
            ("telemetry", "False", not self.telemetry),
        ):
            if not is_right:
                raise ValueError(
                    f'{name} must be {right} with axis="sample", got {getattr(self, name)!r}'
                )


def _check_rates(rates: Mapping[str, float]) -> None:
    for pattern, rate in rates.items():
        if not isinstance(pattern, str):
            raise TypeError(f"rates must have name patterns as keys, got {pattern!r}")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"rates[{pattern!r}] must be a number, got {rate!r}")
        if not 0 <= rate < 1:
            raise ValueError(f"rates[{pattern!r}] must be in [0, 1), got {rate!r}")
