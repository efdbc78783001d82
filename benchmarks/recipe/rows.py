"""The rows: ways to spend less time on a training."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from benchmarks.positions.patches import swap_patches
from benchmarks.positions.rows import swap_rows
from benchmarks.recipe.task import Task
from ssprop_fx import AddedNoise, KeptMass, SparsityConfig, SparsityScheduler, bar, constant, linear
from ssprop_fx.scheduling.base import Schedule
from ssprop_fx.scheduling.sample_rules import SampleRule

__all__ = ["Row", "rows_of"]

_SAMPLES = SparsityConfig(axis="sample")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way to train.

    Attributes:
        name: name of the row.
        about: what differs from the dense run.
        epochs: number of epochs; None for the task's.
        rule: decides how many samples a backward keeps.
        schedule: drop rate in each step, without a rule; None for a dense run.
        rising: final drop rate of one that rises linearly over the run; 0 without.
        config: what is kept.
        share: share of each batch that is trained on at all, its first images.
        prunes: whether whole epochs leave samples of low loss out (InfoBatch).
        stale: target of the added noise by which samples are left out of the forward as well, by
            their scores of the last epoch; 0 for none.
        exact: whether a dense run has the passes of a sliced backward that leave nothing out.
        prepare: changes the model before it is compiled; names of its tensors must stay.
    """

    name: str
    about: str
    epochs: float | None = None
    rule: SampleRule | None = None
    schedule: Schedule | None = None
    rising: float = 0.0
    config: SparsityConfig = field(default_factory=SparsityConfig)
    share: float = 1.0
    prunes: bool = False
    stale: float = 0.0
    exact: bool = False
    prepare: Callable[[nn.Module], nn.Module] | None = None

    @property
    def is_dense(self) -> bool:
        """Whether it belongs to the curve that others are compared with."""
        return self.name.startswith("dense")

    def scheduler(self, steps: int) -> SparsityScheduler | None:
        """Return its scheduler for a run of so many steps; None if it is dense."""
        if self.rule is not None:
            return SparsityScheduler(controller=self.rule)
        if self.rising:
            return SparsityScheduler(linear(0.0, self.rising, steps))
        return None if self.schedule is None else SparsityScheduler(self.schedule)


def _rule(name: str, about: str, rule: SampleRule) -> Row:
    return Row(name=name, about=about, rule=rule, config=_SAMPLES)


_ROWS = (
    Row(
        name="exact-passes",
        about="dense, with those passes of a kept-samples step that leave nothing out, so that only"
        " rounding differs",
        exact=True,
    ),
    _rule("mass-0.9", "fewest samples with 90 % of the gradient norms", KeptMass(0.9)),
    _rule("mass-0.8", "fewest samples with 80 % of the gradient norms", KeptMass(0.8)),
    _rule("noise-0.3", "unbiased draws, added noise at most 0.3", AddedNoise(0.3)),
    _rule("noise-0.1", "unbiased draws, added noise at most 0.1", AddedNoise(0.1)),
    Row(
        name="rising-0.8",
        about="unbiased draws, drop rate rising from 0 to 0.8",
        rising=0.8,
        config=replace(_SAMPLES, select="sampled"),
    ),
    Row(
        name="strongest-half",
        about="the half with the largest gradient norms",
        schedule=constant(0.5),
        config=_SAMPLES,
    ),
    Row(name="smaller-batch", about="a random half of each batch, forward too", share=0.5),
    Row(name="infobatch", about="epochs without half of the samples of low loss", prunes=True),
    Row(
        name="channels-0.8",
        about="every other step without 80 % of the channels",
        schedule=bar(0.8, period=2),
    ),
    Row(
        name="mass-0.9-channels",
        about="mass-0.9, and a quarter of the channels of each layer dropped",
        rule=KeptMass(0.9),
        config=replace(_SAMPLES, rates={"*": 0.25}),
    ),
    Row(
        name="mass-0.9-stale",
        about="mass-0.9, and samples sure since the last epoch left out of the forward, unbiased",
        rule=KeptMass(0.9),
        config=_SAMPLES,
        stale=0.1,
    ),
    Row(
        name="noise-0.3-stale",
        about="noise-0.3, and samples sure since the last epoch left out of the forward, unbiased",
        rule=AddedNoise(0.3),
        config=_SAMPLES,
        stale=0.1,
    ),
    Row(
        name="patches-2",
        about="gradients of convolutions from averages over 2 x 2 positions",
        prepare=partial(swap_patches, r=2),
    ),
    Row(
        name="patches-2-1x1",
        about="patches-2 in 1x1 convolutions alone",
        prepare=partial(swap_patches, r=2, only_1x1=True),
    ),
    Row(
        name="noise-0.1-patches",
        about="noise-0.1, and patches-2-1x1 inside the kept samples",
        rule=AddedNoise(0.1),
        config=replace(_SAMPLES, patch=2),
    ),
    Row(
        name="rows-0.5",
        about="weight gradients of 1x1 convolutions from half of the positions, unbiased",
        prepare=partial(swap_rows, share=0.5),
    ),
    Row(
        name="noise-0.1-rows",
        about="noise-0.1, and rows-0.5 inside the kept samples",
        rule=AddedNoise(0.1),
        config=_SAMPLES,
        prepare=partial(swap_rows, share=0.5),
    ),
)


def rows_of(task: Task) -> dict[str, Row]:
    """Return the rows of a task by name, dense ones first."""
    dense = [Row(name="dense", about="all epochs")]
    dense += [Row(name=f"dense-{n:g}ep", about=f"{n:g} epochs", epochs=n) for n in task.fewer]
    return {row.name: row for row in (*dense, *_ROWS)}
