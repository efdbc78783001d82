"""SparsityScheduler: steps, state, and the runtime sparsity tensor."""

import io
import pickle

import numpy as np
import pytest
import torch
from oracle import SMALLEST

from ssprop_fx import SparsityScheduler, bar, constant, linear, warmup
from ssprop_fx.scheduling.keep_counts import keep_count


class TestSteps:
    def test_begins_at_step_0(self):
        scheduler = SparsityScheduler(linear(0.25, 0.75, steps=2))
        assert (scheduler.last_step, scheduler.drop_rate) == (0, 0.25)

    def test_step_moves_one_step(self):
        scheduler = SparsityScheduler(linear(0.25, 0.75, steps=2))
        seen = []
        for _ in range(3):
            scheduler.step()
            seen.append((scheduler.last_step, scheduler.drop_rate))
        assert seen == [(1, 0.5), (2, 0.75), (3, 0.75)]

    def test_any_function_of_the_step_is_a_schedule(self):
        scheduler = SparsityScheduler(lambda step: step / 4)
        scheduler.step()
        assert scheduler.drop_rate == 0.25

    @pytest.mark.parametrize("schedule", [0.8, None, "bar"])
    def test_a_schedule_that_cannot_be_called(self, schedule):
        with pytest.raises(TypeError, match=r"^schedule must be a schedule such as constant"):
            SparsityScheduler(schedule)

    @pytest.mark.parametrize("rate", [1.0, 80, -0.1, float("nan")])
    def test_a_schedule_that_returns_an_invalid_rate(self, rate):
        with pytest.raises(ValueError, match=r"^schedule must return a drop rate in \[0, 1\)"):
            SparsityScheduler(lambda step: rate)

    def test_an_invalid_rate_later_on_leaves_the_state_as_it_was(self):
        scheduler = SparsityScheduler(lambda step: step / 2)
        counts = scheduler.register([64], multiple=1)
        scheduler.step()
        with pytest.raises(ValueError, match=r"got 1.0 at step 2"):
            scheduler.step()
        assert (scheduler.last_step, scheduler.drop_rate) == (1, 0.5)
        assert counts.tensor.tolist() == [32]

    def test_repr_shows_schedule_and_state(self):
        scheduler = SparsityScheduler(constant(0.5))
        scheduler.step()
        expected = "SparsityScheduler(schedule=constant(rate=0.5), last_step=1, drop_rate=0.5)"
        assert repr(scheduler) == expected


class TestKeepCounts:
    def test_is_an_int64_cpu_tensor_with_one_entry_a_slot(self):
        scheduler = SparsityScheduler(constant(0.5))
        assert scheduler.keep_counts.shape == (0,)
        counts = scheduler.register([32, 64, 48], multiple=16)
        for tensor in (scheduler.keep_counts, counts.tensor):
            assert tensor.dtype == torch.int64
            assert tensor.device.type == "cpu"
            assert tensor.shape == (3,)
            assert not tensor.requires_grad

    def test_holds_the_keep_counts_of_the_drop_rate_in_force(self):
        channels = [32, 64, 100, 2048]
        scheduler = SparsityScheduler(linear(0.0, 0.9, steps=9))
        counts = scheduler.register(channels, multiple=1)
        for _ in range(12):
            rate = scheduler.drop_rate
            assert counts.tensor.tolist() == [keep_count(c, rate) for c in channels]
            scheduler.step()

    def test_steps_write_in_place(self):
        """A compiled step that holds the tensor sees the keep counts of all later steps."""
        scheduler = SparsityScheduler(bar(0.5, period=2))
        counts = scheduler.register([32, 64], multiple=1)
        held, part = scheduler.keep_counts, counts.tensor
        assert held.tolist() == part.tolist() == [32, 64]
        scheduler.step()
        assert held.tolist() == part.tolist() == [16, 32]
        scheduler.load_state_dict({"last_step": 0})
        assert held.tolist() == part.tolist() == [32, 64]
        assert scheduler.keep_counts is held
        assert counts.tensor.data_ptr() == part.data_ptr() == held.data_ptr()

    def test_several_registrations_stand_one_after_another(self):
        scheduler = SparsityScheduler(bar(0.5, period=2))
        first = scheduler.register([32, 64], multiple=1)
        second = scheduler.register([], multiple=1)
        third = scheduler.register([48], multiple=16)
        scheduler.step()
        assert scheduler.keep_counts.tolist() == [16, 32, 32]
        parts = [counts.tensor.tolist() for counts in (first, second, third)]
        assert parts == [[16, 32], [], [32]]
        first.tensor.zero_()
        assert scheduler.keep_counts.tolist() == [0, 0, 32]

    def test_registration_in_mid_training_takes_the_rate_in_force(self):
        scheduler = SparsityScheduler(linear(0.0, 0.75, steps=3))
        for _ in range(2):
            scheduler.step()
        assert scheduler.register([64], multiple=1).tensor.tolist() == [32]


class TestState:
    def test_round_trip(self):
        scheduler = SparsityScheduler(linear(0.0, 0.75, steps=3))
        for _ in range(2):
            scheduler.step()
        other = SparsityScheduler(linear(0.0, 0.75, steps=3))
        counts = other.register([64], multiple=1)
        other.load_state_dict(scheduler.state_dict())
        assert (other.last_step, other.drop_rate) == (2, 0.5)
        assert counts.tensor.tolist() == [32]
        other.step()
        assert other.drop_rate == 0.75

    def test_round_trip_through_a_checkpoint(self):
        scheduler = SparsityScheduler(constant(0.5))
        scheduler.step()
        file = io.BytesIO()
        torch.save(scheduler.state_dict(), file)
        file.seek(0)
        other = SparsityScheduler(constant(0.5))
        other.load_state_dict(torch.load(file, weights_only=True))
        assert other.state_dict() == scheduler.state_dict() == {"last_step": 1}

    def test_the_state_is_a_snapshot(self):
        scheduler = SparsityScheduler(constant(0.5))
        state = scheduler.state_dict()
        scheduler.step()
        assert state == {"last_step": 0}

    @pytest.mark.parametrize(
        "state",
        [{}, {"last_step": -1}, {"last_step": 1.0}, {"last_step": None}, {"last_epoch": 3}],
        ids=str,
    )
    def test_what_is_not_a_state(self, state):
        scheduler = SparsityScheduler(constant(0.5))
        scheduler.step()
        with pytest.raises(ValueError, match=r"^state_dict must come from .*last_step >= 0, got"):
            scheduler.load_state_dict(state)
        assert scheduler.last_step == 1

    def test_a_step_whose_rate_is_invalid_is_not_loaded(self):
        scheduler = SparsityScheduler(lambda step: step / 2)
        with pytest.raises(ValueError, match=r"got 2.0 at step 4"):
            scheduler.load_state_dict({"last_step": 4})
        assert (scheduler.last_step, scheduler.drop_rate) == (0, 0.0)

    def test_pickles_with_its_registrations(self):
        scheduler = SparsityScheduler(bar(0.5, period=2))
        counts = scheduler.register([32, 64], multiple=1)
        scheduler.step()
        other, other_counts = pickle.loads(pickle.dumps((scheduler, counts)))
        assert (other.schedule, other.last_step) == (scheduler.schedule, 1)
        assert other_counts.tensor.tolist() == [16, 32]
        other.step()
        assert other_counts.tensor.tolist() == [32, 64]
        # The original has not changed.
        assert (scheduler.last_step, counts.tensor.tolist()) == (1, [16, 32])


def test_tensors_taken_before_another_model_registers_stay_live():
    scheduler = SparsityScheduler(constant(0.5))
    first = scheduler.register([10], 1)
    tensor, whole = first.tensor, scheduler.keep_counts
    scheduler.register([25] * 1000, 1)
    scheduler.schedule = constant(0.9)
    scheduler.step()
    assert tensor.tolist() == [SMALLEST]
    assert whole is scheduler.keep_counts
    assert whole[:2].tolist() == [SMALLEST, 2]


@pytest.mark.parametrize("state", [None, [], {}, {"last_step": True}, {"last_step": -1}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="state_dict must come from"):
        SparsityScheduler(constant(0.5)).load_state_dict(state)


@pytest.mark.parametrize("rate", ["0.5", None, 1.0, float("nan")])
def test_a_schedule_that_returns_no_drop_rate_is_refused(rate):
    with pytest.raises(ValueError, match="schedule must return a drop rate"):
        SparsityScheduler(lambda step: rate)


def test_a_schedule_may_return_any_real_number():
    scheduler = SparsityScheduler(lambda step: np.float32(0.5))
    assert scheduler.drop_rate == 0.5
    assert type(scheduler.drop_rate) is float


def test_a_plain_function_is_for_the_scheduler_alone():
    with pytest.raises(TypeError, match="only SparsityScheduler takes a plain function"):
        warmup(lambda step: 0.5, 3)
