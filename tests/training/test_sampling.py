import random

import numpy as np
import torch
from torch.utils.data import DataLoader

from ssprop_fx.training.data.sampling import EpochSampler, SeededDataset


class _Noise:
    """Ten samples of noise from the three generators that transforms use."""

    transform = None

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))

    def __len__(self):
        return 10


def _order(sampler, epoch, skip=0):
    sampler.set_epoch(epoch, skip)
    return list(sampler)


def _batches(seed, epoch, skip=0, workers=0):
    dataset = SeededDataset(_Noise(), seed)
    sampler = EpochSampler(len(dataset), seed)
    sampler.set_epoch(epoch, skip)
    return [
        torch.stack(batch).tolist()
        for batch in DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=workers)
    ]


def test_every_epoch_is_a_permutation_of_its_own():
    sampler = EpochSampler(10, seed=1)
    first, second = _order(sampler, 0), _order(sampler, 1)
    assert sorted(index for _, index in first) == list(range(10))
    assert {epoch for epoch, _ in second} == {1}
    assert [index for _, index in first] != [index for _, index in second]
    assert first == _order(EpochSampler(10, seed=1), 0)
    assert first != _order(EpochSampler(10, seed=2), 0)


def test_skipping_leaves_the_rest_of_the_same_order():
    sampler = EpochSampler(10, seed=1)
    whole, rest = _order(sampler, 3), _order(sampler, 3, skip=4)
    assert rest == whole[4:]
    assert len(sampler) == 6


def test_an_epoch_that_is_longer_than_the_data_begins_the_order_again():
    sampler = EpochSampler(4, seed=1, used=10)
    order = [index for _, index in _order(sampler, 0)]
    assert sorted(order[:4]) == list(range(4))
    assert order == (order[:4] * 3)[:10]
    assert [index for _, index in _order(sampler, 0, skip=6)] == order[6:]
    assert len(sampler) == 4


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    whole = _batches(seed=1, epoch=0)
    assert _batches(seed=1, epoch=0, skip=4) == whole[2:]
    assert _batches(seed=1, epoch=0, workers=2) == whole
    dataset = SeededDataset(_Noise(), seed=1)
    assert dataset[0, 3] != dataset[1, 3]
    assert dataset[0, 3] != SeededDataset(_Noise(), seed=2)[0, 3]
    assert dataset[0, 3][1:] != dataset[0, 4][1:]


def test_reading_a_sample_leaves_the_generators_of_the_process_alone():
    dataset = SeededDataset(_Noise(), seed=1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    dataset[0, 3]
    assert (random.random(), np.random.rand(), torch.rand(())) == expected
