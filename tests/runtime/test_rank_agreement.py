"""Selection shared by several ranks equals one process with the whole batch."""

import pytest
import torch
from oracle import relative_error
from rank_cases import OPTIONS, backward, batches, compiled, gradients, net, run_ranks
from ssprop_passes.selection.ranks import Ranks

from ssprop_fx import SparsityConfig

SLOW = [
    "ddp first",
    "ddp first, memory",
    "ddp first, telemetry",
    "fsdp first",
    "compile before fsdp",
    *OPTIONS,
]
DRAWN = ["random", "sampled"]
PACKED = ["kept rows", "kept rows, own", "kept rows, rounded"]
OF_FOUR = ["compile first", "ddp first", "fsdp first", "memory", "inductor"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(folder, "compile first", "accumulated", "disagreeing")


@pytest.fixture(scope="module")
def two_slow_ranks(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("ranks"), *SLOW, *DRAWN, *PACKED)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    cases = [*OF_FOUR, "accumulated", *DRAWN, *PACKED]
    return run_ranks(tmp_path_factory.mktemp("ranks"), *cases, world=4)


def _assert_one_process(ranks, case, **config):
    model = net()
    wanted = gradients(model, compiled(model, **config))
    for rank in ranks:
        errors = [relative_error(*pair) for pair in zip(rank[case], wanted, strict=True)]
        assert max(errors) < 1e-12
    assert 0 < int(wanted[0]["head.layers.0.weight"].any(1).sum()) < 40


def test_two_ranks_are_one_process(two_ranks):
    _assert_one_process(two_ranks, "compile first")


def _assert_accumulated(ranks):
    model = net()
    network = compiled(model)
    for batch in batches():
        backward(network, *batch)
    wanted = {name: p.grad for name, p in model.named_parameters()}
    for rank in ranks:
        assert relative_error(rank["accumulated"], wanted) < 1e-12


def test_accumulated_gradients_are_those_of_one_process(two_ranks):
    _assert_accumulated(two_ranks)


def test_ranks_that_disagree_say_so(two_ranks):
    (first_rates, first_steps), (second_rates, second_steps) = (
        rank["disagreeing"] for rank in two_ranks
    )
    for error in (first_rates, second_rates):
        assert "drop rates from 0.5 to 0.6" in error
    assert "this one is at step 1" in first_steps
    assert "over all ranks steps are from 0 to 1 and drop rates from 0 to 0.6" in first_steps
    # Its keep counts are still the agreed ones: the other rank is ahead.
    assert second_steps == ""


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_two_ranks_of_any_kind_are_one_process(two_slow_ranks, case):
    config = OPTIONS.get(case.removeprefix("ddp first, "), {})
    _assert_one_process(two_slow_ranks, case, **{**config, "backend": "aot_eager"})


def _assert_packed(ranks, case, is_exact):
    """The hook gives the same whole gradients, and does not send rows that no rank keeps."""
    for rank in ranks:
        packed, plain, (dense, *sparse) = rank[case]
        for left, right in zip(packed, plain, strict=True):
            assert relative_error(left, right) < 1e-15 * (len(ranks) - 1)
            if is_exact:
                assert all(torch.equal(left[name], right[name]) for name in left)
            assert all(left[name].stride() == right[name].stride() for name in left)
        assert all(
            torch.equal(left[name], right[name])
            for left, right in zip(packed, ranks[0][case][0], strict=True)
            for name in left
        )
        # If ranks keep their own channels, every channel that some rank keeps.
        assert max(sparse) < (0.8 if case == "kept rows, own" else 0.5)
        assert 0.8 < dense < 1.02


@pytest.mark.slow
@pytest.mark.parametrize("case", PACKED)
def test_kept_rows_are_all_that_is_sent(two_slow_ranks, case):
    _assert_packed(two_slow_ranks, case, is_exact=True)


def _assert_drawn_for_all(ranks, case):
    first, *others = (rank[case] for rank in ranks)
    kept = [step["head.layers.0.weight"].any(1) for step in first]
    # A drawn channel may have a gradient of zero.
    assert all(0 < int(rows.sum()) <= 16 for rows in kept)
    assert not torch.equal(kept[0], kept[1])
    for other in others:
        for left, right in zip(first, other, strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("case", DRAWN)
def test_what_is_drawn_is_drawn_for_all_ranks(two_slow_ranks, case):
    _assert_drawn_for_all(two_slow_ranks, case)


@pytest.mark.slow
def test_four_ranks_are_one_process(four_ranks):
    for case in OF_FOUR:
        config = {**OPTIONS.get(case, {}), "backend": "aot_eager"}
        _assert_one_process(four_ranks, case, **config)
    _assert_accumulated(four_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", DRAWN)
def test_what_is_drawn_is_drawn_for_all_of_four_ranks(four_ranks, case):
    _assert_drawn_for_all(four_ranks, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", PACKED)
def test_kept_rows_are_all_that_four_ranks_send(four_ranks, case):
    # The sum of more than two numbers depends on their order, unless nothing is rounded.
    _assert_packed(four_ranks, case, is_exact=case == "kept rows, rounded")


def test_alone_there_is_nothing_to_share():
    model, other = net(), net()
    shared = gradients(model, compiled(model, ranks="shared"))
    own = gradients(other, compiled(other))
    assert all(
        torch.equal(left[name], right[name])
        for left, right in zip(shared, own, strict=True)
        for name in left
    )


def test_ranks_must_be_there_when_the_model_is_compiled(monkeypatch):
    model = compiled(net(), ranks="shared")
    backward(model, *next(iter(batches())))
    later = Ranks("0", 2)
    monkeypatch.setattr("ssprop_fx.compiler.backend.find_ranks_maybe", lambda: later)
    monkeypatch.setattr("ssprop_fx.runtime.rank_agreement.find_ranks_maybe", lambda: later)
    with pytest.raises(RuntimeError, match=r"with no other rank, and runs with 2 ranks .* now"):
        backward(model, *next(iter(batches())))


def test_ranks_are_named():
    with pytest.raises(ValueError, match=r"ranks must be one of .*'own', 'shared'.*, got 'all'"):
        SparsityConfig(ranks="all")
