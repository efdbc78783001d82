import math

import pytest

from ssprop_fx.training.records.logs import Records
from ssprop_fx.training.records.plot import plot_run
from ssprop_fx.training.records.rows import StepRow, median_ms
from ssprop_fx.training.records.summary import format_summary


def _row(step, *, drop_rate=0.0, ms=10.0, timed=1, steps_per_epoch=3, saved=0.0, kept_mass=1.0):
    return StepRow(
        step=step,
        epoch=step // steps_per_epoch,
        loss=2.0 / (step + 1),
        drop_rate=drop_rate,
        backward_saved=saved,
        lr=0.1,
        ms=ms,
        timed=timed,
        kept_mass=kept_mass,
        added_noise=0.1,
    )


def _fill(records, steps):
    for step in steps:
        sparse = step >= 3
        records.add_step(
            _row(
                step,
                drop_rate=0.8 if sparse else 0.0,
                ms=5.0 if sparse else 10.0,
                timed=int(step % 3 > 0),
                saved=0.6 if sparse else 0.0,
                kept_mass=0.5 if sparse else 1.0,
            )
        )
        if step % 3 == 2:
            records.add_epoch(
                epoch=step // 3, eval_loss=1.0, eval_top1=50.0 + step, batch_size=4, seconds=2.0
            )


def test_median_leaves_out_untimed_steps_and_the_other_phase():
    rows = [_row(0, ms=900, timed=0), _row(1, ms=10), _row(2, ms=12), _row(3, ms=14)]
    rows.append(_row(4, drop_rate=0.5, ms=7))
    assert median_ms(rows, sparse=False) == 12
    assert median_ms(rows, sparse=True) == 7
    assert math.isnan(median_ms(rows[:1], sparse=False))


def test_rows_are_read_back_and_those_after_the_checkpoint_dropped(tmp_path):
    records = Records(tmp_path)
    _fill(records, range(8))
    records.flush()
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 9
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 3

    resumed = Records(tmp_path, step=4, epoch=1)
    assert [row.step for row in resumed.steps] == [0, 1, 2, 3]
    assert [row.epoch for row in resumed.epochs] == [0]
    assert resumed.steps[3] == records.steps[3]
    assert math.isnan(resumed.epochs[0].sparse_ms)
    _fill(resumed, range(4, 8))
    resumed.flush()

    again = Records(tmp_path, step=8, epoch=2)
    assert [row.step for row in again.steps] == list(range(8))
    assert [row.eval_top1 for row in again.epochs] == [52.0, 55.0]


def test_an_epoch_sums_up_its_own_steps(tmp_path):
    records = Records(tmp_path)
    _fill(records, range(6))
    row = records.epochs[1]
    assert row.step == 6
    assert row.train_loss == pytest.approx((2 / 4 + 2 / 5 + 2 / 6) / 3)
    assert (row.drop_rate, row.backward_saved) == pytest.approx((0.8, 0.6))
    assert row.sparse_ms == 5.0
    assert math.isnan(row.dense_ms)
    assert row.images_per_s == 3 * 4 / 2.0


def test_summary_compares_the_phases(tmp_path):
    records = Records(tmp_path)
    _fill(records, range(6))
    text = format_summary(records, batch_size=4)
    assert "speed-up of a sparse step: 2.00" in text
    assert "5.0 to 5.0" in text
    assert "60.0% of a sparse step, 30.0% of the run" in text
    assert "55.00 % at the end, 55.00 % at best (epoch 1)" in text


def test_summary_of_a_run_with_nothing_measured_has_dashes(tmp_path):
    records = Records(tmp_path)
    records.add_step(_row(0, timed=0))
    text = format_summary(records, batch_size=4)
    assert "speed-up of a sparse step: -" in text
    assert "nan" not in text


def test_plot_is_a_png_even_without_a_timed_step(tmp_path):
    records = Records(tmp_path)
    records.add_step(_row(0, timed=0))
    plot_run(records, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
