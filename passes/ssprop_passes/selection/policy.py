"""Selection: which channels a sparse backward is made of; gathering and scattering them.

Plain torch functions: at once the reference and what the pass traces. The keep count k may be an
int or a SymInt that is read at run time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssprop_passes.fingerprint import identity_maybe
from ssprop_passes.kernels import operators
from ssprop_passes.selection.error_feedback import NOTHING, Remembered, average, left_out, recall
from ssprop_passes.selection.ranks import Ranks
from ssprop_passes.selection.scores import Score, all_but, l2, power_over_ranks
from ssprop_passes.selection.selectors import Selector, topk

__all__ = [
    "AXES",
    "GRADIENTS",
    "Selection",
    "add_channels",
    "dims_order",
    "gather_channels",
    "gather_rows",
    "gather_weight",
    "is_channels_last",
    "scale_channels",
    "scatter_rows",
    "sum_channels",
    "with_order",
]

# What is chosen: output channels of each layer, or samples of the batch.
AXES = ("channel", "sample")

# Which of the gradients of input, weight and bias are made of the kept channels alone.
GRADIENTS = {
    "both": (True, True, True),
    "weight": (False, True, True),
    "input": (True, False, False),
}


@dataclass(frozen=True)
class Selection:
    """How channels are chosen, and for which gradients.

    Attributes:
        score: what each channel is worth; see `ssprop_passes.selection.scores`.
        select: which are kept, given that; see `ssprop_passes.selection.selectors`.
        gradients: `"both"`, or `"weight"` or `"input"` alone; the other one is then dense, and
            exact. The gradient of the bias follows that of the weight.
        block: channels are chosen in blocks of this many neighbours, by the sum of their scores.
        memory: coefficient eta in [0, 1) of what earlier steps left out; see
            `ssprop_passes.selection.error_feedback`.
        score_decay: weight in [0, 1) of the scores of earlier steps; see
            `ssprop_passes.selection.error_feedback`.
        ranks: the processes that keep the same channels; see `ssprop_passes.selection.ranks`. None
            where each keeps its own.
        observer: is told of each choice: grad_output, scores, indices and weights. It must not
            change what is computed, and is no part of the identity.
        input_score: that of channels for the gradient of the input, where it is another than
            for those of weight and bias; needs `gradients="both"` and nothing remembered.
        axis: `"channel"`, or `"sample"`: see `ssprop_passes.selection.samples`.
    """

    score: Score = l2
    select: Selector = topk
    gradients: str = "both"
    block: int = 1
    memory: float = 0.0
    ranks: Ranks | None = None
    observer: Callable[[Tensor, Tensor, Tensor, Tensor | None], object] | None = None
    input_score: Score | None = None
    axis: str = "channel"
    score_decay: float = 0.0

    @property
    def remembers(self) -> tuple[str, ...]:
        """The fields of `Remembered` that each call of a layer has."""
        coefficients = {"left_out": self.memory, "scores": self.score_decay}
        return tuple(name for name, coefficient in coefficients.items() if coefficient)

    @property
    def parts(self) -> tuple["Selection", ...]:
        """One selection for the gradients that share their channels, each with a single score."""
        if self.input_score is None:
            return (self,)
        weight = replace(self, gradients="weight", input_score=None)
        return weight, replace(weight, gradients="input", score=self.input_score)

    def sparse(self, wanted: Sequence[bool]) -> tuple[bool, bool, bool]:
        """Return which gradients of input, weight and bias are sparse, given those wanted."""
        chosen = GRADIENTS[self.gradients]
        return wanted[0] and chosen[0], wanted[1] and chosen[1], wanted[2] and chosen[2]

    def keep(
        self,
        grad_output: Tensor,
        weight: Tensor,
        k: int,
        groups: int = 1,
        memory: Remembered = NOTHING,
    ) -> tuple[Tensor, Tensor]:
        """Return the kept channels of `grad_output`, weighted if the selector weights them.

        With a memory they are chosen from, and are those of, `grad_output` and what was left out
        before together, by scores of several steps.

        Args:
            grad_output: [N, C, *space].
            weight: [C, ...].
            k: keep count of each group, in [1, C / groups]; a multiple of `block`.
            groups: number of groups, whose channels follow one another.
            memory: what earlier steps left behind; what this one does takes its place, in the same
                tensors.

        Returns:
            The channels, [N, groups * k, *space], and their indices, int64 [groups * k], grouped.

        Raises:
            ValueError: a score or selector of the user's returns what is none.
        """
        if memory.left_out is not None:
            grad_output = recall(grad_output, memory.left_out, self.memory)
        scores = self.score(grad_output, weight)
        self.check_scores(scores, grad_output.shape[1])
        if self.ranks is not None:
            scores = self.ranks.mean(scores, power_over_ranks(self.score))
        mean_scores = scores
        if memory.scores is not None:
            mean_scores = average(memory.scores, scores, self.score_decay)
        indices, weights = self.choose(mean_scores, k, groups)
        if self.observer is not None:
            self.observer(grad_output, scores, indices, weights)
        if memory.scores is not None:
            # What is not finite is chosen, for a `GradScaler` to find, and not remembered.
            is_finite = mean_scores.isfinite()
            memory.scores.copy_(torch.where(is_finite, mean_scores, memory.scores))
        if memory.left_out is not None:
            left = left_out(grad_output, indices, weights, memory.left_out.dtype)
            memory.left_out.copy_(left if self.ranks is None else self.ranks.mean(left))
        kept = gather_channels(grad_output, indices)
        return kept if weights is None else scale_channels(kept, weights), indices

    def check_scores(self, scores: Tensor, count: int) -> None:
        """Raise a ValueError unless there is one score for each of `count` channels or samples."""
        if tuple(scores.shape) != (count,):
            raise ValueError(
                f"score must return one score a {self.axis}, shape ({count},),"
                f" got {tuple(scores.shape)}"
            )

    def choose(self, scores: Tensor, k: int, groups: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return the channels that are kept, and their weights, None where all are 1.

        Args:
            scores: [C], the groups one after another.
            k: keep count of each group, in [1, C / groups]; a multiple of `block`.
            groups: number of groups.

        Returns:
            Indices into the C channels, int64 [groups * k], grouped; weights, [groups * k].

        Raises:
            ValueError: the selector returns no indices.
        """
        channels = scores.shape[0]
        if groups > 1:
            scores = scores.view(groups, channels // groups)
        if self.block == 1:
            indices, weights = self._select(scores, k)
        else:
            by_block = scores.view(*scores.shape[:-1], -1, self.block).sum(-1)
            indices, weights = self._select(by_block, k // self.block)
            within = torch.arange(self.block, device=scores.device)
            indices = (indices[..., None] * self.block + within).flatten(-2)
            if weights is not None:
                weights = weights[..., None].expand(*weights.shape, self.block).flatten(-2)
        if groups > 1:
            offsets = torch.arange(0, channels, channels // groups, device=scores.device)
            indices = (indices + offsets[:, None]).flatten()
            weights = None if weights is None else weights.flatten()
        if self.ranks is not None and self.select is not topk:
            # What a selector draws differs from rank to rank.
            indices = self.ranks.first(indices)
            weights = None if weights is None else self.ranks.first(weights)
        return indices, weights

    def _select(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        chosen = self.select(scores, k)
        indices, weights = chosen if isinstance(chosen, tuple) else (chosen, None)
        if indices.dtype != torch.int64 or indices.shape[:-1] != scores.shape[:-1]:
            raise ValueError(
                "select must return int64 indices, k of each group,"
                f" got {indices.dtype} of shape {tuple(indices.shape)}"
            )
        return indices, weights

    @property
    def identity(self) -> str | None:
        """A text that changes with what is computed, None where a function's is not known."""
        scores = [identity_maybe(part.score) for part in self.parts]
        select = identity_maybe(self.select)
        if select is None or None in scores:
            return None
        memory = self.memory, self.score_decay
        how = self.gradients, self.block, memory, self.axis, self.ranks
        return repr((scores, select, how))


def sum_channels(grad_output: Tensor, dim: int = 1) -> Tensor:
    """Return the sum of each channel, [C]: the gradient of a bias."""
    return grad_output.sum(all_but(grad_output, dim))


def gather_channels(x: Tensor, indices: Tensor) -> Tensor:
    """Return `x[:, indices]`, [N, k, *space], in the memory format of `x`, [N, C, *space]."""
    if is_channels_last(x):
        # Indexing dimension 1 directly yields a contiguous tensor when the number of indices is
        # only known at run time, and convolutions on it are two to three times slower.
        return x.permute(_last(x))[..., indices].permute(_first(x))
    return x[:, indices]


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Return `x[indices]`, [k, *rest], in the memory format of `x`, [N, *rest]."""
    if is_channels_last(x):
        return x.permute(_last(x))[indices].permute(_first(x))
    return x[indices]


def scale_channels(x: Tensor, weights: Tensor) -> Tensor:
    """Return `x`, [N, k, *space], with each channel times its weight, [k], in the dtype of `x`."""
    return x * weights.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


def gather_weight(rows: Tensor, indices: Tensor) -> Tensor:
    """Return `rows[indices]`, [k, ...], in the memory format of a weight's rows, [C, ...]."""
    kept: Tensor = operators.gather_weight(rows, indices, is_channels_last(rows))
    return kept


def scatter_rows(rows: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Return zeros of the shape of `like`, [C, ...], but for `rows`, [k, ...], at `indices`."""
    full: Tensor = operators.scatter_rows(rows, indices, like.shape[0], is_channels_last(like))
    return full


def add_channels(channels: Tensor, indices: Tensor, like: Tensor) -> Tensor:
    """Return zeros of the shape of `like`, [N, C, *space], with `channels` added at `indices`.

    Args:
        channels: [N, k, *space].
        indices: [k], may repeat.
        like: [N, C, *space].
    """
    return torch.zeros_like(like).index_add(1, indices, channels)


def dims_order(x: Tensor) -> list[int]:
    """Return the dimensions of a tensor from the outermost to the innermost in memory."""
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda d: -strides[d])


def with_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """Return `x` dense, its dimensions laid out in this order; itself if it is that already.

    An order and no strides: a symbolic stride of a tensor that is no input of the trace has no
    node in it, and cannot be compared with.
    """
    permuted = x.permute(*order)
    if permuted.is_contiguous():
        return x
    inverse = [list(order).index(d) for d in range(x.ndim)]
    return permuted.clone(memory_format=torch.contiguous_format).permute(inverse)


def is_channels_last(x: Tensor) -> bool:
    """Say whether a tensor lies channels last; never where its space is a single point.

    A single point has no layout, and torch asks the unbacked channel count for one.
    """
    if x.ndim not in (4, 5) or all(size == 1 for size in x.shape[2:]):
        return False
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=layout) and not x.is_contiguous()


def _last(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim), 1]


def _first(x: Tensor) -> list[int]:
    return [0, x.ndim - 1, *range(1, x.ndim - 1)]
