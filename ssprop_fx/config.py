"""SparsityConfig: what takes part in sparse back-propagation, and how channels are chosen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ssprop_passes.selection.policy import AXES, GRADIENTS, Selection
from ssprop_passes.selection.scores import SCORES, Score
from ssprop_passes.selection.selectors import SELECTORS, Selector, sampled
from torch import nn

__all__ = ["RANKS", "TARGETS", "SparsityConfig"]

TARGETS = ("conv", "depthwise", "linear")
RANKS = ("own", "shared")


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Which layers take part in sparse back-propagation, and how their channels are chosen.

    Args:
        channel_multiple: the channels kept of a layer, of all groups together, are rounded to the
            nearest multiple of this, at least one multiple and at most all channels. `1` means
            exactly `max(int((1 - drop_rate) * C), 1)`, the published code's rule, in each group.
            `"auto"` is 8, as tensor cores and oneDNN want, and 16 in layers of 256 channels or
            more, where oneDNN is faster at that; 1 for samples.
        min_channels: layers with fewer output channels stay dense.
        filter_fn: `filter_fn(module, fqn) -> bool` says whether a module takes part; `fqn` is its
            name as in `model.named_modules()`. None lets all take part but the classifier of a
            timm model (`model.get_classifier()`): it has few of the FLOPs, and what its backward
            leaves out is missing in every other layer.
        targets: the kinds of layer that take part, of `"conv"`, `"depthwise"` (convolutions whose
            output channels read one input channel each) and `"linear"`. All by default: where
            moving channels costs more than it saves, as with small depthwise kernels on a CPU, the
            gate leaves a layer dense.
        select: which channels are kept, given their scores: `"topk"`, those with the largest;
            `"random"`, any; `"sampled"`, drawn with probability in proportion to the score and
            weighted so that the expected gradients are the dense ones; or a function of your own,
            as `ssprop_passes.selection.selectors` describes and the second example shows.
        axis: `"channel"`: each layer keeps some of its output channels. `"sample"`: all layers keep
            the same samples of the batch, of all channels, chosen in each backward by the gradient
            at the participating layer nearest the loss; the drop rate is then of samples, and
            `max(int((1 - drop_rate) * N), 1)` of N are kept. The batch is the leading dimension of
            the model's first input, and must be that of a layer's input too, or the leading
            dimension a multiple of it, the rows of each sample next to one another, as with windows
            or frames; sequence-first layouts are not for it. The gradients of a kept sample are
            exact where layers treat each sample by itself, as layer norm does; batch norm couples
            samples, and the gradients of its statistics are those of the kept ones alone. The whole
            model must be one graph. `block`, `memory`, rates above 0 in `rates`,
            `specialize=True` and `ranks="shared"` are of channels and do not go with it.
        score: what a channel is worth: `"l2"`, the l2 norm of its gradient, which hardly costs time
            where a batch norm follows, whose backward has the sums; `"mean_abs"`, the mean
            magnitude of that, the published code's score; `"l2_weight"`, the norm times that of the
            channel's row of the weight, which is what it matters to the gradient of the input; or a
            function of your own, as `ssprop_passes.selection.scores` describes. Of samples,
            `"l2_weight"` takes the norm of the layer's input in place of the weight's.
        gradients: which gradients are computed from the kept channels alone: those of weight and
            input, `"both"`, or one of them, `"weight"` or `"input"`, while the other is dense and
            exact, and half of the FLOPs is saved. The gradient of a bias follows the weight's.
        block: channels are kept in blocks of this many neighbours, by the sum of their scores.
            Layers whose channels, or those of a group, are no multiple of it stay dense.
        memory: coefficient in [0, 1) of memorized sparse back-propagation (Zhang et al., arXiv
            1905.10194): so much of what the last sparse backward of a layer left out is added to
            the gradient of its output, which channels are then chosen from. What is remembered is
            a mean over the batch (for linear layers over all leading dimensions) and is added to
            every sample's gradient, so that it is of the scale of one sample's gradient: with a
            loss that is a mean over the batch, another batch size finds it too large or too small
            by the ratio of the two. Each backward updates it, of micro-batches too; dense steps
            leave it as it is. A gradient that `gradients` leaves dense is without it. It is state:
            see `model.ssprop.memory.state_dict()`, and keep that in your checkpoints.
        rates: name pattern -> drop rate in [0, 1), for layers whose drop rate is not the
            scheduler's, such as `{"stem.*": 0, "layer4.*": 0.9}`. Patterns are those of `fnmatch`
            on names as in `model.named_modules()`, and the first that matches counts. The rate
            stands in place of the scheduler's wherever that is above 0, so that dense phases are
            dense everywhere, and a schedule that rises step by step does not move it. 0 is dense.
        gate: whether a layer whose backward is not faster sparse stays dense. Each is measured
            once, when it is compiled, at the schedule's highest drop rate, and the times are kept
            beside Inductor's cache. A drop rate at which the layers would not save a tenth of
            their time, which is about what a sparse step costs beside, runs dense. False makes
            every layer sparse at every drop rate above 0. AOT eager, which is not for speed, has no
            gate, nor have ranks that share their selection: by their own times they would not
            always agree.
        specialize: whether keep counts are compiled in as constants, which is faster by a few
            percent at most, lets CUDA graphs be used, and costs a compile for each drop rate of the
            schedule. `"auto"` does so where there are at most
            two above 0, as in `constant`, `bar` and `warmup` of these, and layers of one shape
            have one rate; `report(model)` says so. True does so for up to six. Keep counts that
            are none of the schedule's are read at run time, and with False all are: one compile
            serves every drop rate. The gradients are the same.
        ranks: which channels the processes of a data-parallel run keep: `"own"`, each those that
            its samples say; `"shared"`, all of them those that one process with the whole batch
            would keep, so that the averaged gradients are those of that process. Scores are
            averaged over the default process group, in the backward, by one small all-reduce a
            layer, and a memory by one as large as itself; what random selectors draw is rank 0's.
            All ranks must take the same steps with the same model and schedule, which is checked,
            on batches of one size. Where there is no process group when the model is first run in
            a sparse step, or one rank alone, there is nothing to share. See docs/distributed.md.
        telemetry: whether sparse backwards leave behind what `SparsityScheduler.telemetry` reads
            and a controller needs: how much of each gradient they keep.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of its range.

    Examples:
        >>> config = SparsityConfig(filter_fn=lambda module, fqn: not fqn.startswith("stem"))
        >>> config.min_channels
        32

        A selector of one's own: the better half of what is kept are the largest, the rest any.

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

    channel_multiple: int | Literal["auto"] = "auto"
    min_channels: int = 32
    filter_fn: Callable[[nn.Module, str], bool] | None = None
    targets: tuple[str, ...] = TARGETS
    select: str | Selector = "topk"
    axis: Literal["channel", "sample"] = "channel"
    score: str | Score = "l2"
    gradients: Literal["both", "weight", "input"] = "both"
    block: int = 1
    memory: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    gate: bool = True
    specialize: bool | Literal["auto"] = "auto"
    ranks: Literal["own", "shared"] = "own"
    telemetry: bool = False

    @property
    def selection(self) -> Selection:
        """How channels are chosen, as the pass takes it."""
        return Selection(
            score=SCORES[self.score] if isinstance(self.score, str) else self.score,
            axis=self.axis,
            select=SELECTORS[self.select] if isinstance(self.select, str) else self.select,
            gradients=self.gradients,
            block=self.block,
            memory=float(self.memory),
        )

    def __post_init__(self) -> None:
        if self.channel_multiple != "auto":
            _check_positive_int("channel_multiple", self.channel_multiple, ' or "auto"')
        _check_positive_int("min_channels", self.min_channels)
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise TypeError(
                "filter_fn must be a callable (module, fqn) -> bool or None,"
                f" got {self.filter_fn!r}"
            )
        if isinstance(self.targets, str) or not isinstance(self.targets, tuple):
            raise TypeError(f'targets must be a tuple such as ("conv",), got {self.targets!r}')
        if not self.targets or not set(self.targets) <= set(TARGETS):
            raise ValueError(f"targets must be of {TARGETS}, at least one, got {self.targets!r}")
        _check_name_or_function("select", self.select, tuple(SELECTORS))
        _check_name_or_function("score", self.score, tuple(SCORES))
        if self.gradients not in tuple(GRADIENTS):
            raise ValueError(f"gradients must be one of {tuple(GRADIENTS)}, got {self.gradients!r}")
        _check_positive_int("block", self.block)
        if self.ranks not in RANKS:
            raise ValueError(f"ranks must be one of {RANKS}, got {self.ranks!r}")
        _check_share("memory", self.memory)
        if self.memory and self.selection.select is sampled:
            raise ValueError(
                'memory must be 0 with select="sampled", which is unbiased already: what it leaves'
                f" out adds up to nothing, and to add it again is noise; got {self.memory!r}"
            )
        _check_rates(self.rates)
        self._check_axis()
        if not isinstance(self.gate, bool):
            raise TypeError(f"gate must be True or False, got {self.gate!r}")
        if not isinstance(self.specialize, bool) and self.specialize != "auto":
            raise ValueError(f'specialize must be True, False or "auto", got {self.specialize!r}')
        if not isinstance(self.telemetry, bool):
            raise TypeError(f"telemetry must be True or False, got {self.telemetry!r}")
        # A copy, so that it stays as it was checked.
        object.__setattr__(self, "rates", dict(self.rates))

    def _check_axis(self) -> None:
        if self.axis not in AXES:
            raise ValueError(f"axis must be one of {AXES}, got {self.axis!r}")
        if self.axis == "channel":
            return
        for name, right, is_right in (
            ("block", "1", self.block == 1),
            ("memory", "0", not self.memory),
            ("specialize", 'False or "auto"', self.specialize is not True),
            ("ranks", '"own"', self.ranks == "own"),
            ("rates", "all 0", not any(self.rates.values())),
            ("telemetry", "False", not self.telemetry),
        ):
            if not is_right:
                raise ValueError(
                    f'{name} must be {right} with axis="sample", got {getattr(self, name)!r}'
                )
        if self.gradients == "input" and self.selection.select is sampled:
            raise ValueError(
                'select must not be "sampled" with axis="sample" and gradients="input": its weights'
                " are for the gradient of the weight, which is dense then"
            )


def _check_name_or_function(name: str, value: object, known: tuple[str, ...]) -> None:
    if isinstance(value, str):
        if value not in known:
            raise ValueError(f"{name} must be one of {known} or a function, got {value!r}")
    elif not callable(value):
        raise TypeError(f"{name} must be one of {known} or a function, got {value!r}")


def _check_rates(rates: object) -> None:
    if not isinstance(rates, Mapping):
        raise TypeError(f'rates must be a dict such as {{"layer4.*": 0.9}}, got {rates!r}')
    for pattern, rate in rates.items():
        if not isinstance(pattern, str):
            raise TypeError(f"rates must have name patterns as keys, got {pattern!r}")
        _check_share(f"rates[{pattern!r}]", rate)


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def _check_positive_int(name: str, value: object, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int{alternative}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
