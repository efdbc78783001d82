"""Keep counts: a model's part of the runtime sparsity tensor, and the rule that fills it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from ssprop_passes.sites.site import MIN_KEEP_COUNT

from ssprop_fx.scheduling.sample_rules import KeptSamples, SampleRule
from ssprop_fx.scheduling.telemetry import Telemetry

__all__ = ["KeepCounts", "RateSource", "keep_count"]

# From this size on, rounding to a multiple of 16 is off by at most a 32nd of the channels.
_MANY_CHANNELS = 256


class RateSource(Protocol):
    """The scheduler that keep counts follow; it owns the runtime sparsity tensor."""

    @property
    def highest_drop_rate(self) -> float:
        """The highest drop rate that the schedule visits."""

    @property
    def levels(self) -> frozenset[float] | None:
        """All drop rates above 0 that the schedule visits; None if there are many."""

    @property
    def keep_counts(self) -> torch.Tensor:
        """The runtime sparsity tensor: int64, CPU, [slots of all models]."""

    def refresh(self) -> None:
        """Write the keep counts at the drop rate in force into the tensor."""


class KeepCounts:
    """One model's part of a scheduler's runtime sparsity tensor.

    `SparsityScheduler.register` makes it.

    Attributes:
        channels: output channels of each slot of the model; of a last slot for samples, the batch
            size.
        groups: number of groups in which each slot selects channels.
        rates: drop rate of each slot that has its own, None for the others.
        block: keep counts are multiples of this.
        multiple: keep counts are rounded to multiples of this; see `keep_count`.
        names: layer name of each slot.
        batch: whether the last slot is not of a layer: it counts the kept samples of the batch.
        rule: decides how many samples are kept, in place of the tensor; None without one.
        samples: those that the last backward was made of; None if it was of the whole batch.
        telemetry: what the model's sparse backwards report.
    """

    def __init__(
        self,
        source: RateSource,
        start: int,
        channels: Sequence[int],
        multiple: int | Literal["auto"],
        groups: Sequence[int],
        rates: Sequence[float | None],
        block: int,
        names: Sequence[str],
        batch: bool = False,
        rule: SampleRule | None = None,
    ) -> None:
        self._source = source
        self._start = start
        self.channels = tuple(channels)
        self.multiple = multiple
        self.groups = tuple(groups)
        self.rates = tuple(rates)
        self.block = block
        self.names = tuple(names)
        self.batch = batch
        self.rule = rule
        self.samples: KeptSamples | None = None
        self.telemetry = Telemetry()

    def of_batch(self, size: int) -> int:
        """Return how many samples of a batch of this size a backward keeps, from the tensor."""
        if self.channels[-1] != size:
            self.channels = (*self.channels[:-1], size)
            self._source.refresh()
        return int(self.tensor[-1])

    def at(self, drop_rate: float, controlled: Mapping[str, float] | None = None) -> list[int]:
        """Return the keep count of each slot at a drop rate of the schedule.

        Args:
            drop_rate: the schedule's.
            controlled: drop rate of each layer that a controller has decided on, by name. It
                replaces the schedule's if that is above 0.
        """
        rates = [drop_rate if rate is None or drop_rate == 0 else rate for rate in self.rates]
        if controlled and drop_rate > 0:
            rates = [controlled.get(n, rate) for n, rate in zip(self.names, rates, strict=True)]
        return [self._keep_count(slot, rate) for slot, rate in enumerate(rates)]

    def shares(self) -> dict[str, float]:
        """Return the share of channels that each layer keeps now, by name."""
        kept = zip(self.names, self.tensor.tolist(), self.groups, self.channels, strict=True)
        return {name: count * groups / channels for name, count, groups, channels in kept}

    def rounding(self, name: str) -> Callable[[float], float]:
        """Return a function: drop rate -> share of channels that the layer keeps."""
        slot = self.names.index(name)
        whole = self.channels[slot] // self.groups[slot]
        return lambda drop_rate: self._keep_count(slot, drop_rate) / whole

    @property
    def adjustable(self) -> list[str]:
        """Names of the layers that have no drop rate of their own."""
        return [n for n, rate in zip(self.names, self.rates, strict=True) if rate is None]

    def _keep_count(self, slot: int, drop_rate: float) -> int:
        channels, groups = self.channels[slot], self.groups[slot]
        if self.batch and slot == len(self.channels) - 1:
            # Rounded first: 5/6 of 24 samples are 20, whatever the last digits say.
            return max(int(round((1 - drop_rate) * channels, 9)), 1)
        return keep_count(channels, drop_rate, self.multiple, groups, self.block)

    @property
    def smallest(self) -> list[int]:
        """The keep count of each slot at the schedule's highest drop rate."""
        return self.at(self._source.highest_drop_rate)

    @property
    def levels(self) -> frozenset[tuple[int, ...]] | None:
        """The keep counts of all slots at each drop rate of the schedule; None if too many."""
        rates = self._source.levels
        return None if rates is None else frozenset(tuple(self.at(rate)) for rate in rates)

    @property
    def tensor(self) -> torch.Tensor:
        """The live keep counts: int64, CPU, shape [slots of the model]."""
        return self._source.keep_counts[self._start : self._start + len(self.channels)]


def keep_count(
    channels: int,
    drop_rate: float,
    multiple: int | Literal["auto"] = 1,
    groups: int = 1,
    block: int = 1,
) -> int:
    """Return how many channels of each group a backward keeps at `drop_rate`.

    Multiple 1 is the rule of the published code, `max(int(share_kept * channels), 1)` (ssProp,
    arXiv 2408.12561), in each group. With other multiples or blocks, the kept channels of all
    groups together are rounded to the nearest multiple, with at least one channel of each group.
    On torch releases below 2.15 the smallest keep count is 2 blocks (`MIN_KEEP_COUNT`).

    Args:
        channels: output channels of the layer.
        drop_rate: fraction in [0, 1) left out.
        multiple: channels are kept in multiples of this; `"auto"` means 8, or 16 in layers of 256
            channels or more.
        groups: number of groups in which channels are selected.
        block: channels of a group are kept in multiples of this as well. It must divide the number
            of channels in a group.

    Returns:
        The keep count, in [1, channels / groups].

    Examples:
        >>> keep_count(64, 0.8), keep_count(64, 0.8, multiple=16), keep_count(24, 0.8, multiple=16)
        (12, 16, 16)
        >>> keep_count(40, 0.8), keep_count(100, 0.9)
        (8, 10)
        >>> keep_count(64, 0.8, groups=4), keep_count(64, 0.8, multiple=16, groups=4)
        (3, 4)
        >>> keep_count(64, 0.8, block=4), keep_count(64, 0.8, multiple=16, groups=2, block=3)
        (12, 24)
        >>> keep_count(128, 0.8, multiple="auto"), keep_count(512, 0.8, multiple="auto")
        (24, 96)
    """
    if multiple == "auto":
        multiple = 8 if channels < _MANY_CHANNELS else 16
    channels_of_group = channels // groups
    step = math.lcm(multiple // math.gcd(multiple, groups), block)
    # The published code takes the share kept, 0.2, and (1 - 0.8) is a little less.
    kept = round(1 - drop_rate, 12) * channels_of_group
    rounded = int(kept) if multiple == block == 1 else math.floor(kept / step + 0.5) * step
    return min(max(rounded, step, MIN_KEEP_COUNT * block), channels_of_group)
