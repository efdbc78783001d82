"""SampleChoice: the samples that the backward of one forward is made of.

A forward of the model opens a choice. Its backward makes it, from the gradients of the model's
outputs, before any graph's backward runs. A compiled backward finds the choice by its number, which
the graph's forward saved.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ClassVar, cast
from weakref import WeakValueDictionary

import torch
from ssprop_passes.errors import SsPropCompileError
from ssprop_passes.selection.policy import Selection
from ssprop_passes.selection.samples import (
    choose_samples,
    sample_factors,
    sample_scores,
    split_samples,
    weigh_samples,
)
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ssprop_fx.scheduling.keep_counts import KeepCounts
from ssprop_fx.scheduling.sample_rules import KeptSamples, sample_count

__all__ = ["SampleChoice", "current_choice_maybe", "opened"]

# Key in the metadata of autograd nodes.
_KEY = "ssprop_choice"

_current: ContextVar["SampleChoice | None"] = ContextVar("ssprop_sample_choice", default=None)


class SampleChoice:
    """The kept samples of one forward.

    Args:
        selection: how samples are chosen, unless the model's rule says that.
        counts: the model's keep counts; it says how many samples to keep, and is told what was
            kept.

    Attributes:
        size: samples in the batch, N; 0 before a compiled forward ran.
        kept: number of samples that the backward keeps, k. With a rule, it is known once the
            backward begins.
        indices: the kept samples, int64 [k]; None before the backward begins.
        calls: number of compiled graphs that the forward has run.
        maker: number of the graph's call whose backward made the choice; 0 if the model's outputs
            did.
    """

    _numbers: ClassVar = itertools.count(1)
    _calls: ClassVar = itertools.count(1)
    _open: ClassVar[WeakValueDictionary[int, "SampleChoice"]] = WeakValueDictionary()

    def __init__(self, selection: Selection, counts: KeepCounts) -> None:
        self._number = next(self._numbers)
        self._open[self._number] = self
        rule = counts.rule
        self._selection = (
            selection
            if rule is None or rule.select is None
            else replace(selection, select=rule.select)
        )
        self._counts = counts
        # The backward may keep all samples, and then it tells nothing.
        counts.samples = None
        self.size = self.kept = self.calls = 0
        self.indices: Tensor | None = None
        self.maker = 0

    def count_call(self) -> Tensor:
        """Return what a graph saves for its backward: the choice and the call, int64 [2]."""
        self.calls += 1
        return torch.tensor([self._number, next(self._calls)])

    @classmethod
    def find(cls, saved: Tensor) -> tuple["SampleChoice", int]:
        """Return the choice and the number of the call that `count_call` wrote."""
        number, call = saved.tolist()
        return cls._open[number], call

    @staticmethod
    def behind_maybe(inputs: Sequence[Any], size: int) -> "SampleChoice | None":
        """Return the choice of the graph that these inputs come from, through eager code or not.

        None if there is none of this batch size.
        """
        nodes: list[Any] = [value.grad_fn for value in inputs if isinstance(value, Tensor)]
        seen = {None}
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            choice = node.metadata.get(_KEY)
            if choice is None:
                nodes += [source for source, _ in node.next_functions]
            elif choice.size == size:
                return cast(SampleChoice, choice)
        return None

    def start(self, size: int) -> None:
        """Set the batch size, at the first compiled forward.

        Raises:
            SsPropCompileError: another graph of the same forward has another batch size.
        """
        if not self.size:
            # The backward may come after the next step of the schedule.
            self.size, self.kept = size, self._counts.of_batch(size)
        elif size != self.size:
            raise SsPropCompileError(
                f"a graph of the model takes {size} samples and another one {self.size}, but they"
                ' keep the same samples: use axis="channel"'
            )

    def keep_alive(self, outputs: Any) -> None:
        """Make a graph's outputs hold this choice until their backward has run."""
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                node: Any = output.grad_fn
                node.metadata[_KEY] = self

    def make(
        self, gradients: Sequence[Tensor], places: Sequence[tuple[int, int]], maker: int = 0
    ) -> list[Tensor]:
        """Choose the samples; return the gradients multiplied by the samples' weights.

        Args:
            gradients: gradients of the outputs.
            places: where each has the samples: dim and inner, as `split_samples` describes.
            maker: number of the graph's call whose backward this is; 0 for the model's outputs.
        """
        self.maker = maker
        with torch.no_grad():
            split = [
                split_samples(g, self.size, dim, inner).movedim(dim + 1, 0)
                for g, (dim, inner) in zip(gradients, places, strict=True)
            ]
            scores = sample_scores(self._selection, split)
            if self._counts.rule is not None:
                self.kept = sample_count(self._counts.rule, scores)
            self.indices, weights = choose_samples(self._selection, scores, self.kept)
            self._counts.samples = KeptSamples(scores, self.indices, weights)
            factors = sample_factors(self.indices, weights, self.size)
            return [
                weigh_samples(g, factors, *place)
                for g, place in zip(gradients, places, strict=True)
            ]

    def attach(self, output: Any) -> Any:
        """Return the model's output, such that its backward begins with the choice.

        If the model is one graph, that graph's backward chooses: it knows where its gradients have
        samples. So does the first compiled backward if the shape of an output does not say that.
        """
        if self.calls < 2:
            return output
        leaves, structure = tree_flatten(output)
        places = [i for i, leaf in enumerate(leaves) if _has_gradient(leaf)]
        dims = [_batch_dim(leaves[i], self.size) for i in places]
        if not self.size or not places or None in dims:
            return output
        chosen = _Choose.apply(self, dims, *(leaves[i] for i in places))
        for place, leaf in zip(places, chosen, strict=True):
            leaves[place] = leaf
        return tree_unflatten(leaves, structure)


class _Choose(torch.autograd.Function):
    """The identity; its backward makes the choice from all gradients that reach it."""

    @staticmethod
    def forward(ctx: Any, choice: SampleChoice, dims: list[int], *outputs: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.choice, ctx.dims = choice, dims
        # Views of several outputs could not be changed in place.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        known = [(i, g) for i, g in enumerate(gradients) if g is not None]
        made = ctx.choice.make([g for _, g in known], [(ctx.dims[i], 1) for i, _ in known])
        results: list[Tensor | None] = [None] * len(gradients)
        for (i, _), gradient in zip(known, made, strict=True):
            results[i] = gradient
        return None, None, *results


def current_choice_maybe() -> SampleChoice | None:
    """Return the choice of the model's forward that runs now; None if nothing opened one."""
    return _current.get()


@contextmanager
def opened(choice: SampleChoice) -> Iterator[SampleChoice]:
    """Make a choice the current one: all graphs that run in the `with` block share it."""
    token = _current.set(choice)
    try:
        yield choice
    finally:
        _current.reset(token)


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _batch_dim(output: Tensor, size: int) -> int | None:
    """Return the dimension that holds the samples; None if the shape does not say which."""
    shape = cast(Sequence[int], output.shape)
    found = [d for d, n in enumerate(shape) if n == size]
    # A size that is a multiple of the batch's may be samples merged with tokens.
    is_merged = any(n % size == 0 for n in shape[: found[0]]) if found else False
    return found[0] if len(found) == 1 and not is_merged else None
