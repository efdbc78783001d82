"""Selection: which channels or samples a backward keeps, and for which gradients.

This is plain torch, both the reference and what the pass traces. The keep count k may be an int or
a SymInt that is read at run time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ssprop_passes.fingerprint import identity_maybe
from ssprop_passes.selection.error_feedback import left_out, recall
from ssprop_passes.selection.gather_scatter import gather_channels, scale_channels
from ssprop_passes.selection.ranks import Ranks
from ssprop_passes.selection.scores import Score, l2, power_over_ranks
from ssprop_passes.selection.selectors import Selector, topk

__all__ = ["GRADIENTS", "Selection"]

# Which of the gradients of input, weight and bias use only the kept channels.
GRADIENTS = {
    "both": (True, True, True),
    "weight": (False, True, True),
    "input": (True, False, False),
}


@dataclass(frozen=True)
class Selection:
    """How channels or samples are chosen, and for which gradients.

    Attributes:
        score: how much each channel matters; see `ssprop_passes.selection.scores`.
        select: which channels to keep, given their scores; see
            `ssprop_passes.selection.selectors`.
        gradients: which gradients are sparse: `"both"`, `"weight"` or `"input"`. The other one
            stays dense and exact. The bias gradient follows the weight gradient.
        block: channels are chosen in blocks of this many neighbours, by the sum of their scores.
        memory: coefficient eta in [0, 1) of what earlier steps left out; see
            `ssprop_passes.selection.error_feedback`.
        ranks: the processes that keep the same channels; see `ssprop_passes.selection.ranks`. None
            if each process chooses its own.
        observer: called with grad_output, scores, indices and weights of each choice. It must not
            change what is computed, and is not part of the identity.
        axis: what is chosen first, `"channel"` or `"sample"`; see
            `ssprop_passes.selection.samples`.
    """

    score: Score = l2
    select: Selector = topk
    gradients: str = "both"
    block: int = 1
    memory: float = 0.0
    ranks: Ranks | None = None
    observer: Callable[[Tensor, Tensor, Tensor, Tensor | None], object] | None = None
    axis: str = "channel"

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
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the kept channels of `grad_output`, weighted if the selector weights them.

        With a memory, eta times the memory is first added to `grad_output`.

        Args:
            grad_output: [N, C, *space].
            weight: [C, ...].
            k: keep count of each group, in [1, C / groups]; a multiple of `block`.
            groups: number of groups; the channels of a group are consecutive.
            memory: what the last step left out, [C, *space]; updated in place. None without memory.

        Returns:
            The channels, [N, groups * k, *space], and their indices, int64 [groups * k], grouped.

        Raises:
            RuntimeError: a custom score or selector fails.
            ValueError: a custom score or selector returns a result of the wrong form.
        """
        if memory is not None:
            grad_output = recall(grad_output, memory, self.memory)
        scores = self.scores_of(grad_output, weight)
        if self.ranks is not None:
            scores = self.ranks.mean(scores, power_over_ranks(self.score))
        indices, weights = self.choose(scores, k, groups)
        if self.observer is not None:
            self.observer(grad_output, scores, indices, weights)
        if memory is not None:
            left = left_out(grad_output, indices, weights, memory.dtype)
            memory.copy_(left if self.ranks is None else self.ranks.mean(left))
        kept = gather_channels(grad_output, indices)
        return kept if weights is None else scale_channels(kept, weights), indices

    def scores_of(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """Return the score of each channel or sample.

        Args:
            grad_output: [N, C, *space], or [D, samples].
            weight: [C, ...], or [samples, D].

        Raises:
            RuntimeError: a custom score fails.
            ValueError: there is not one score for each.
        """
        scores = _call("score", self.score, grad_output, weight)
        count = grad_output.shape[1]
        if tuple(getattr(scores, "shape", ())) != (count,):
            raise ValueError(
                f"score must return one score per {self.axis}, shape ({count},),"
                f" got {_form(scores)}"
            )
        return cast(Tensor, scores)

    def choose(self, scores: Tensor, k: int, groups: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return the kept channels and their weights; the weights are None if all are 1.

        Args:
            scores: [C], one group after another.
            k: keep count of each group, in [1, C / groups]; a multiple of `block`.
            groups: number of groups.

        Returns:
            Indices into the C channels, int64 [groups * k], grouped; weights, [groups * k].

        Raises:
            ValueError: the selector does not return indices.
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
            # A selector may draw different numbers on each rank.
            indices = self.ranks.first(indices)
            weights = None if weights is None else self.ranks.first(weights)
        return indices, weights

    def _select(self, scores: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
        chosen = _call("select", self.select, scores, k)
        indices, weights = chosen if isinstance(chosen, tuple) else (chosen, None)
        if (
            getattr(indices, "dtype", None) != torch.int64
            or indices.shape[:-1] != scores.shape[:-1]
            or not _is_same(indices.shape[-1], k)
        ):
            raise ValueError(
                f"select must return int64 indices, k of each group, with k = {k}"
                f" got {_form(indices)}"
            )
        return indices, weights

    @property
    def identity(self) -> str | None:
        """A text that changes when the computation changes; None if a function has no identity."""
        score, select = identity_maybe(self.score), identity_maybe(self.select)
        if score is None or select is None:
            return None
        how = self.gradients, self.block, self.memory, self.axis, self.ranks
        return repr((score, select, how))


def _call(argument: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that the user may have written; an error names the argument it came by."""
    try:
        return function(*args)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{argument} failed with {what}") from error


def _is_same(size: int, k: int) -> bool:
    """Return whether two sizes are equal whatever k is, if k is read at run time."""
    difference: Any = size - k
    if isinstance(difference, int):
        return difference == 0
    symbols = difference.node.expr.free_symbols
    return all(
        difference.node.expr.subs(dict.fromkeys(symbols, value)) == 0 for value in (6, 11, 17)
    )


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape ({', '.join(map(str, value.shape))})"
