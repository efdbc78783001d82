"""Schedules against their closed forms, and against the published code's schedules."""

import math
import pickle
from collections.abc import Callable

import pytest

from ssprop_fx import (
    Schedule,
    SparsityScheduler,
    bar,
    constant,
    cosine,
    join,
    linear,
    warmup,
)

# Rounding error between 1 - (p - (p - m) x) and (1 - p) + (p - m) x, for values below 1.
ROUNDING = 4 * math.ulp(1.0)

EXAMPLES = [
    constant(0.8),
    linear(0.1, 0.8, steps=7),
    cosine(0.0, 0.95, steps=9),
    bar(0.8, period=4),
    bar(0.8, period=10, dense_fraction=0.3),
    warmup(bar(0.8, period=2), steps=3),
    join([constant(0.2), linear(0.2, 0.6, steps=3), constant(0.6)], boundaries=[2, 5]),
]


def rates(schedule: Callable[[int], float], steps: int) -> list[float]:
    """The drop rates of a scheduler, step by step."""
    scheduler = SparsityScheduler(schedule)
    found = [scheduler.drop_rate]
    for _ in range(steps - 1):
        scheduler.step()
        found.append(scheduler.drop_rate)
    return found


def assert_same_rates(schedule: Schedule, closed_form: Callable[[int], float], steps: int) -> None:
    expected = [closed_form(step) for step in range(steps)]
    assert rates(schedule, steps) == pytest.approx(expected, rel=0, abs=ROUNDING)


class TestClosedForms:
    @pytest.mark.parametrize("rate", [0.0, 0.5, 0.999])
    def test_constant_is_the_rate_at_every_step(self, rate):
        assert [constant(rate)(step) for step in (0, 1, 10**9)] == [rate] * 3

    @pytest.mark.parametrize(("start", "end"), [(0.0, 0.8), (0.8, 0.0), (0.3, 0.3)])
    @pytest.mark.parametrize("steps", [1, 2, 10])
    def test_linear_is_a_straight_line_to_its_end(self, start, end, steps):
        schedule = linear(start, end, steps=steps)
        for step in range(steps + 1):
            expected = start * (1 - step / steps) + end * step / steps
            assert schedule(step) == pytest.approx(expected, rel=0, abs=ROUNDING)
        assert schedule(steps + 1) == schedule(1000 * steps) == pytest.approx(end, rel=1e-15)

    @pytest.mark.parametrize(("start", "end"), [(0.0, 0.8), (0.8, 0.0), (0.3, 0.3)])
    @pytest.mark.parametrize("steps", [1, 2, 10])
    def test_cosine_is_half_a_wave_to_its_end(self, start, end, steps):
        schedule = cosine(start, end, steps=steps)
        for step in range(steps + 1):
            # The half-angle form, so that the test does not repeat the code.
            expected = start + (end - start) * math.sin(math.pi * step / steps / 2) ** 2
            assert schedule(step) == pytest.approx(expected, rel=0, abs=ROUNDING)
        assert (schedule(0), schedule(steps), schedule(1000 * steps)) == (start, end, end)

    @pytest.mark.parametrize("period", [1, 2, 5, 10])
    def test_bar_is_dense_in_the_first_half_of_each_period(self, period):
        schedule = bar(0.8, period=period)
        for step in range(3 * period):
            assert schedule(step) == (0.0 if 2 * (step % period) < period else 0.8)

    @pytest.mark.parametrize(
        ("fraction", "expected"),
        [(0.0, [0.8] * 4), (0.25, [0.0] + [0.8] * 3), (0.75, [0.0] * 3 + [0.8]), (1.0, [0.0] * 4)],
    )
    def test_bar_takes_the_dense_share_of_the_period(self, fraction, expected):
        schedule = bar(0.8, period=4, dense_fraction=fraction)
        assert [schedule(step) for step in range(8)] == expected * 2

    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_warmup_is_dense_then_starts_the_schedule_at_its_step_0(self, steps):
        inner = linear(0.4, 0.8, steps=4)
        schedule = warmup(inner, steps=steps)
        assert [schedule(step) for step in range(steps)] == [0.0] * steps
        assert [schedule(steps + step) for step in range(6)] == [inner(step) for step in range(6)]

    def test_join_starts_each_part_at_its_own_step_0(self):
        parts = [linear(0.0, 0.5, steps=5), constant(0.7), cosine(0.7, 0.2, steps=3)]
        schedule = join(parts, boundaries=[3, 4])
        expected = [parts[0](0), parts[0](1), parts[0](2), parts[1](0)]
        expected += [parts[2](step) for step in range(5)]
        assert [schedule(step) for step in range(9)] == expected

    def test_join_of_one_part_is_that_part(self):
        part = linear(0.1, 0.8, steps=7)
        assert [join([part], [])(step) for step in range(9)] == [part(step) for step in range(9)]


class TestPublishedSchedulesByEpoch:
    """One `scheduler.step()` an epoch. Keep p, minimum m, E epochs; drop rate = 1 - keep."""

    CASES = pytest.mark.parametrize(
        ("p", "m", "epochs"), [(1.0, 0.2, 30), (0.946, 0.2, 7), (0.5, 0.1, 2), (0.3, 0.3, 5)]
    )

    @CASES
    def test_constant(self, p, m, epochs):
        assert_same_rates(constant(1 - p), lambda e: 1 - p, epochs)

    @CASES
    def test_linear(self, p, m, epochs):
        def closed_form(e):
            return 1 - max(m, p - (p - m) * e / (epochs - 1))

        assert_same_rates(linear(1 - p, 1 - m, steps=epochs - 1), closed_form, epochs)

    @CASES
    def test_cosine(self, p, m, epochs):
        def closed_form(e):
            return 1 - (m + (p - m) * (1 + math.cos(math.pi * e / (epochs - 1))) / 2)

        assert_same_rates(cosine(1 - p, 1 - m, steps=epochs - 1), closed_form, epochs)

    @CASES
    def test_step_at_half_time(self, p, m, epochs):
        def closed_form(e):
            return 1 - (p if e < epochs // 2 else m)

        ours = join([constant(1 - p), constant(1 - m)], boundaries=[epochs // 2])
        assert_same_rates(ours, closed_form, epochs)

    @CASES
    def test_alternation_of_dense_and_sparse_epochs(self, p, m, epochs):
        def closed_form(e):
            return 0.0 if e % 2 == 0 else 1 - p

        assert_same_rates(bar(1 - p, period=2), closed_form, epochs)

    @pytest.mark.parametrize("dense", [1, 2, 5])
    def test_alternation_after_dense_epochs(self, dense):
        p, epochs = 0.2, 12

        def closed_form(e):
            return 0.0 if e < dense or (e - dense) % 2 == 0 else 1 - p

        assert_same_rates(warmup(bar(1 - p, period=2), steps=dense), closed_form, epochs)

    @pytest.mark.parametrize("dense", [1, 2, 5])
    def test_dense_epochs_in_front_of_a_ramp(self, dense):
        """The published ramp also counts the dense epochs, so it starts part of the way up."""
        p, m, epochs = 0.9, 0.2, 12

        def keep(e):
            return max(m, p - (p - m) * e / (epochs - 1))

        ramp = linear(1 - keep(dense), 1 - m, steps=epochs - 1 - dense)
        ours = warmup(ramp, steps=dense)
        assert_same_rates(ours, lambda e: 0.0 if e < dense else 1 - keep(e), epochs)


class TestPublishedSchedulesByIteration:
    """One `scheduler.step()` an iteration. Keep p, minimum m, period of T iterations."""

    PERIODS = 4
    CASES = pytest.mark.parametrize(
        ("p", "m", "period"), [(1.0, 0.2, 10), (0.946, 0.2, 7), (0.5, 0.1, 2), (0.3, 0.3, 5)]
    )

    def boundaries(self, period):
        return [period * n for n in range(1, self.PERIODS)]

    @CASES
    def test_constant(self, p, m, period):
        assert_same_rates(constant(1 - p), lambda i: 1 - p, self.PERIODS * period)

    @CASES
    def test_linear_begins_anew_each_period(self, p, m, period):
        def closed_form(i):
            return 1 - max(m, p - (p - m) * (i % period) / period)

        ours = join([linear(1 - p, 1 - m, steps=period)] * self.PERIODS, self.boundaries(period))
        assert_same_rates(ours, closed_form, self.PERIODS * period)

    @CASES
    def test_cosine_goes_back_and_forth(self, p, m, period):
        def closed_form(i):
            return 1 - (m + (p - m) * (1 + math.cos(math.pi * i / period)) / 2)

        down, up = cosine(1 - p, 1 - m, steps=period), cosine(1 - m, 1 - p, steps=period)
        ours = join([down, up] * (self.PERIODS // 2), self.boundaries(period))
        assert_same_rates(ours, closed_form, self.PERIODS * period)

    @CASES
    def test_step_at_half_of_each_period(self, p, m, period):
        def closed_form(i):
            return 1 - (p if i % period < period // 2 else m)

        starts = [n * period + half for n in range(self.PERIODS) for half in (0, period // 2)]
        ours = join([constant(1 - p), constant(1 - m)] * self.PERIODS, starts[1:])
        assert_same_rates(ours, closed_form, self.PERIODS * period)

    @pytest.mark.parametrize("period", [2, 10, 64])
    def test_half_of_each_period_dense_is_bar(self, period):
        m = 0.2

        def closed_form(i):
            return 1 - (1.0 if i % period < period // 2 else m)

        assert_same_rates(bar(1 - m, period=period), closed_form, self.PERIODS * period)

    @pytest.mark.parametrize("epoch", [1, 3, 10])
    def test_alternation_of_epochs_counted_in_iterations(self, epoch):
        p = 0.2

        def closed_form(i):
            return 0.0 if (i // epoch) % 2 == 0 else 1 - p

        assert_same_rates(bar(1 - p, period=2 * epoch), closed_form, 5 * epoch)

    @pytest.mark.parametrize("epoch", [1, 3, 10])
    def test_alternation_after_dense_epochs_counted_in_iterations(self, epoch):
        p, dense = 0.2, 3

        def closed_form(i):
            e = i // epoch
            return 0.0 if e < dense or (e - dense) % 2 == 0 else 1 - p

        ours = warmup(bar(1 - p, period=2 * epoch), steps=dense * epoch)
        assert_same_rates(ours, closed_form, 9 * epoch)


class TestBadArguments:
    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda rate: constant(rate), "rate"),
            (lambda rate: linear(rate, 0.5, steps=2), "start"),
            (lambda rate: linear(0.5, rate, steps=2), "end"),
            (lambda rate: cosine(rate, 0.5, steps=2), "start"),
            (lambda rate: cosine(0.5, rate, steps=2), "end"),
            (lambda rate: bar(rate, period=2), "rate"),
        ],
    )
    def test_rates(self, make, name):
        for rate in (1.0, 1, 80, -0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match=rf"^{name} must be in \[0, 1\), got {rate}"):
                make(rate)
        for rate in ("0.5", None, True):
            with pytest.raises(TypeError, match=rf"^{name} must be a number in \[0, 1\)"):
                make(rate)

    @pytest.mark.parametrize(
        ("make", "name", "minimum"),
        [
            (lambda steps: linear(0.0, 0.5, steps=steps), "steps", 1),
            (lambda steps: cosine(0.0, 0.5, steps=steps), "steps", 1),
            (lambda steps: bar(0.5, period=steps), "period", 1),
            (lambda steps: warmup(constant(0.5), steps=steps), "steps", 0),
            (lambda steps: join([constant(0.5)] * 2, boundaries=[steps]), "boundaries", 1),
        ],
    )
    def test_steps(self, make, name, minimum):
        make(minimum)
        with pytest.raises(ValueError, match=f"^{name} must be at least {minimum}, got"):
            make(minimum - 1)
        for steps in (2.0, "2", None, True):
            with pytest.raises(TypeError, match=f"^{name} must be an int, got"):
                make(steps)

    @pytest.mark.parametrize("fraction", [-0.1, 1.1, 50, math.nan])
    def test_dense_fraction(self, fraction):
        with pytest.raises(ValueError, match=r"^dense_fraction must be in \[0, 1\], got"):
            bar(0.5, period=2, dense_fraction=fraction)

    @pytest.mark.parametrize("schedule", [0.8, None, constant, lambda step: 0.8])
    def test_parts_that_are_not_schedules(self, schedule):
        with pytest.raises(TypeError, match=r"^schedule must be a schedule such as constant"):
            warmup(schedule, steps=2)
        with pytest.raises(TypeError, match=r"^schedules must be a schedule such as constant"):
            join([constant(0.5), schedule], boundaries=[2])

    @pytest.mark.parametrize(
        ("parts", "boundaries"), [(0, []), (1, [2]), (2, []), (2, [1, 2]), (3, [1])]
    )
    def test_join_of_unequal_numbers(self, parts, boundaries):
        with pytest.raises(ValueError, match=r"^boundaries must have one entry fewer"):
            join([constant(0.5)] * parts, boundaries)

    @pytest.mark.parametrize("boundaries", [[2, 2], [3, 2]])
    def test_join_boundaries_that_do_not_increase(self, boundaries):
        with pytest.raises(ValueError, match=r"^boundaries must increase"):
            join([constant(0.5)] * 3, boundaries)


class TestValues:
    @pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
    def test_prints_as_the_code_that_makes_it(self, schedule):
        assert eval(repr(schedule)) == schedule

    def test_functions_make_classes_of_their_name(self):
        names = [repr(schedule).partition("(")[0] for schedule in EXAMPLES]
        kinds = [type(schedule).__name__ for schedule in EXAMPLES]
        assert kinds == [f"{name.capitalize()}Schedule" for name in names]

    @pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
    def test_pickles(self, schedule):
        copy = pickle.loads(pickle.dumps(schedule))
        assert copy == schedule
        assert [copy(step) for step in range(20)] == [schedule(step) for step in range(20)]

    def test_compares_by_kind_and_value(self):
        again = [eval(repr(schedule)) for schedule in EXAMPLES]
        for i, schedule in enumerate(EXAMPLES):
            assert [schedule == other for other in again] == [i == j for j in range(len(again))]
        assert linear(0.1, 0.8, steps=7) != cosine(0.1, 0.8, steps=7)
        assert len(set(EXAMPLES + again)) == len(EXAMPLES)

    @pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
    def test_is_frozen(self, schedule):
        name = next(iter(vars(schedule)))
        with pytest.raises(AttributeError):
            setattr(schedule, name, 0.1)

    @pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
    def test_returns_floats_in_range(self, schedule):
        assert isinstance(schedule, Schedule)
        for step in range(50):
            assert isinstance(schedule(step), float)
            assert 0.0 <= schedule(step) < 1.0

    def test_integer_rates_come_out_as_floats(self):
        for schedule in (constant(0), bar(0, period=2), linear(0, 0, steps=2)):
            assert isinstance(schedule(1), float)

    def test_join_keeps_its_parts_whatever_becomes_of_the_list(self):
        parts, boundaries = [constant(0.2), constant(0.8)], [2]
        schedule = join(parts, boundaries)
        parts.clear()
        boundaries[0] = 5
        assert schedule(2) == 0.8


def test_bar_is_dense_for_exactly_its_fraction_of_the_period():
    for period in (25, 60, 799):
        for dense in range(period + 1):
            schedule = bar(0.8, period, dense / period)
            assert sum(schedule(step) == 0 for step in range(period)) == dense


def test_join_and_bar_name_what_is_not_of_their_type():
    with pytest.raises(TypeError, match="schedules must be a sequence"):
        join(constant(0.5), [])
    with pytest.raises(TypeError, match="boundaries must be a sequence"):
        join([constant(0.5)], 3)
    with pytest.raises(TypeError, match="dense_fraction must be a number"):
        bar(0.5, 2, "0.5")
