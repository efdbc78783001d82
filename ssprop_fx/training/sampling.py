"""Data order and augmentation as pure functions of (seed, epoch, index).

A run that stops in the middle of an epoch and continues later must see the very batches that it
would have seen, without reading again those that it has seen, and whatever the number of loader
workers. So neither order nor augmentation draws on a random state that is carried along.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["EpochSampler", "SeededDataset"]


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) pairs in a random order that seed and epoch alone decide.

    Args:
        length: number of samples in the dataset.
        seed: seed of the run.
    """

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._epoch = 0
        self._skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: the epoch, from 0.
            skip: number of samples at its beginning that are left out.
        """
        self._epoch = epoch
        self._skip = skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(_derive_seed(self._seed, self._epoch))
        order = torch.randperm(self._length, generator=generator).tolist()
        for index in order[self._skip :]:
            yield self._epoch, index

    def __len__(self) -> int:
        return self._length - self._skip


class SeededDataset(Dataset[Any]):
    """A dataset whose random transforms depend on (seed, epoch, index) alone.

    Args:
        dataset: the dataset, with a settable `transform`.
        seed: seed of the run.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """The transform of the images; timm's loader factory sets it."""
        transform: Callable[[Any], Any] | None = self._dataset.transform
        return transform

    @transform.setter
    def transform(self, transform: Callable[[Any], Any] | None) -> None:
        self._dataset.transform = transform

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        with _seeded(_derive_seed(self._seed, epoch, index)):
            return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)


def _derive_seed(*parts: int) -> int:
    # Strings are hashed by SHA-512, so that neighbouring parts give unrelated seeds.
    return random.Random(repr(parts)).getrandbits(63)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the generators that transforms use; without loader workers the model shares them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
