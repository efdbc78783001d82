"""Data order and augmentation as pure functions of (seed, epoch, index).

A run that resumes inside an epoch must see the batches that it would have seen without the stop. It
must not read the earlier ones again, and the number of loader workers must not matter. So order and
augmentation use no random state that carries over from sample to sample.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["EpochSampler", "SeededDataset", "derive_seed", "seeded"]


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) pairs in a random order that depends only on seed and epoch.

    With several processes, each takes every `world_size`-th pair of that order. In each step they
    together see the samples that one process with the same total batch size would see.

    Args:
        length: number of samples in the dataset.
        seed: seed of the run.
        used: number of samples of an epoch, over all processes; the rest of the order is left
            out, and if it is too short, it begins again. None uses all.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        *,
        used: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._length = length
        self._seed = seed
        self._used = length if used is None else used
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0
        self._skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose what the next iteration yields.

        Args:
            epoch: the epoch, from 0.
            skip: number of samples to leave out at its beginning, over all processes.
        """
        self._epoch = epoch
        self._skip = skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, self._epoch))
        order = torch.randperm(self._length, generator=generator).tolist()
        order *= -(-self._used // self._length)
        for index in order[self._skip : self._used][self._rank :: self._world_size]:
            yield self._epoch, index

    def __len__(self) -> int:
        return len(range(self._skip + self._rank, self._used, self._world_size))


class SeededDataset(Dataset[Any]):
    """A dataset whose random transforms depend only on (seed, epoch, index).

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
        with seeded(derive_seed(self._seed, epoch, index)):
            return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on the parts."""
    # Random hashes a string with SHA-512, so neighbouring parts give unrelated seeds.
    return random.Random(repr(parts)).getrandbits(63)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that transforms use, and restore them at the end.

    Without loader workers, the model uses the same generators.
    """
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
