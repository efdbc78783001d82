"""Order: which images a row trains on, step by step, and their factors in the loss."""

import torch
from ssprop_passes.selection.selectors import sampled
from torch import Tensor

from benchmarks.recipe.rows import Row
from ssprop_fx import AddedNoise
from ssprop_fx.scheduling.sample_rules import sample_count

__all__ = ["Order"]

# InfoBatch leaves out this share of the samples of low loss, until this share of the epochs.
_PRUNED = 0.5
_PRUNES_UNTIL = 0.875


class Order:
    """The batches of one run.

    All rows of a seed see the same images in the same order, except that a row may leave some out.

    Args:
        row: the row.
        count: training images.
        batch_size: images in a whole batch.
        epochs: epochs of the run; the last may be a part of one.
        seed: decides the order.

    Attributes:
        steps: number of steps of the whole run.
        divisor: what the sum of the losses is divided by.
    """

    def __init__(self, row: Row, count: int, batch_size: int, epochs: float, seed: int) -> None:
        self._row, self._count, self._batch_size, self._seed = row, count, batch_size, seed
        self._per_epoch = count // batch_size
        self._epochs = epochs
        self.divisor = batch_size * row.share
        self._losses = torch.full((count,), torch.inf)
        self._norms = torch.full((count,), torch.nan)
        self._generator = torch.Generator().manual_seed(seed)
        self._queue: list[tuple[Tensor, Tensor | None]] = []
        self._epoch = 0
        # Pruned epochs are shorter. How much is known only then; the learning rate needs it first.
        pruned = min(max(round(epochs * _PRUNES_UNTIL) - 1, 0), epochs) if row.prunes else 0
        self._shorter = round(self._per_epoch * (1 - _PRUNED * 0.6))
        whole = epochs - pruned
        self.steps = round(whole * self._per_epoch) + round(pruned * self._shorter)
        self._last_pruned = pruned

    def next(self) -> tuple[Tensor, Tensor | None]:
        """Return the images of the next step, int64 [n], and their factors, [n] or None."""
        if not self._queue:
            self._queue = self._fill()
            self._epoch += 1
        indices, factors = self._queue.pop(0)
        if self._row.stale and not self._norms[indices].isnan().any():
            return self._sure_left_out(indices)
        return indices, factors

    def tell(self, indices: Tensor, losses: Tensor, norms: Tensor) -> None:
        """Remember what a step found out about its images.

        Args:
            indices: its images, [n].
            losses: [n].
            norms: of their gradients of the logits, [n].
        """
        self._losses[indices], self._norms[indices] = losses, norms

    def _fill(self) -> list[tuple[Tensor, Tensor | None]]:
        order = torch.randperm(
            self._count, generator=torch.Generator().manual_seed(1000 * self._seed + self._epoch)
        )
        factors = torch.ones(self._count)
        is_pruned = self._row.prunes and 0 < self._epoch <= self._last_pruned
        if is_pruned:
            # InfoBatch (Qin et al., ICLR 2024): those below the mean loss are left out at random,
            # and the others of them count more, so that the expected gradient stays.
            low = self._losses < self._losses.mean()
            kept = ~low | (torch.rand(self._count, generator=self._generator) >= _PRUNED)
            factors[low] = 1 / (1 - _PRUNED)
            order = order[kept[order]]
        size = self._batch_size
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        if self._row.share < 1:
            batches = [batch[: int(size * self._row.share)] for batch in batches]
        return [(batch, factors[batch] if is_pruned else None) for batch in batches]

    def _sure_left_out(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return an unbiased draw of a batch by the norms of the last epoch."""
        norms = self._norms[indices]
        count = sample_count(AddedNoise(self._row.stale), norms)
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (), generator=self._generator)))
            chosen, weights = sampled(norms, count)
        return indices[chosen], weights
