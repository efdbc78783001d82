"""Selection shared by several ranks: equal to one process that has the whole batch."""

import pytest
import torch
from oracle import relative_error
from rank_cases import compiled, gradients, net, run_ranks


def _of_one_process(**config):
    model = net()
    return gradients(model, compiled(model, **config))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), "compile first", "ddp first")


@pytest.mark.parametrize("case", ["compile first", "ddp first"])
def test_two_ranks_are_one_process(two_ranks, case):
    wanted = _of_one_process()
    for rank in two_ranks:
        errors = [relative_error(*pair) for pair in zip(rank[case], wanted, strict=True)]
        assert max(errors) < 1e-12
    assert 0 < int(wanted[0]["head.0.weight"].any(1).sum()) < 40
    assert torch.equal(*(rank[case][-1]["head.0.weight"] for rank in two_ranks))
