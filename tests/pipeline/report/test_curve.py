"""A metrics.jsonl becomes a few hundred points."""

from __future__ import annotations

import math

import pytest

from hedgehog.pipeline.report.curve import MAX_MARKS, MAX_POINTS, read_curve


def curve(records):
    return read_curve("label", 2, records, "kl", "valid_kl")


def test_few_steps_are_drawn_as_they_are():
    found = curve([{"step": step, "kl": 1 / step} for step in (1, 2, 3)])
    assert found.points == ((1, 1), (2, 1 / 2), (3, 1 / 3))
    assert (found.steps_per_point, found.smooth, found.num_left_out, found.style) == (1, (), 0, 2)


def test_many_steps_are_means_that_leave_none_out():
    records = [{"step": step, "kl": float(step % 7)} for step in range(1, 1002)]
    found = curve(records)
    assert found.steps_per_point == math.ceil(1001 / MAX_POINTS) == 4
    assert len(found.points) == math.ceil(1001 / 4)
    assert found.points[0] == (2.5, (1 + 2 + 3 + 4) / 4) and found.points[-1] == (1001, 1001 % 7)
    assert found.points[1][0] == 6.5


def test_the_smooth_line_neither_lags_nor_bends_a_straight_one():
    found = curve([{"step": step, "kl": 2.0 * step} for step in range(1, 101)])
    assert len(found.smooth) == 100 and found.smooth_steps == 5
    for (step, value), (at, smooth) in zip(found.points, found.smooth, strict=True):
        assert at == step and smooth == pytest.approx(value)


def test_the_smooth_line_is_less_rough():
    found = curve([{"step": step, "kl": float(step % 2)} for step in range(1, 1001)])
    rough = [value for _, value in found.smooth[20:-20]]
    assert max(rough) - min(rough) < 0.2


def test_marks_are_single_measurements_with_both_ends():
    records = [{"step": step, "kl": 1.0, "valid_kl": 1.0 / step} for step in range(1, 200)]
    found = curve(records)
    assert (len(found.marks), found.num_marks) == (MAX_MARKS, 199)
    assert found.marks[0] == (1, 1) and found.marks[-1] == (199, 1 / 199)
    assert set(found.marks) <= {(step, 1.0 / step) for step in range(1, 200)}


def test_what_is_no_number_is_left_out_and_counted():
    values = [1.0, math.nan, math.inf, "x", None, True, 10**400, 2.0]
    records = [{"step": step, "kl": value} for step, value in enumerate(values)]
    records += [{"step": None, "kl": 1.0}, {"kl": 1.0}, {"step": 99, "valid_kl": math.nan}, {"step": 5}]
    found = curve(records)
    assert found.points == ((0, 1), (7, 2))
    assert found.num_left_out == 9


def test_a_step_that_was_made_again_counts_as_the_last_time():
    found = curve([{"step": 1, "kl": 1.0}, {"step": 2, "kl": 9.0}, {"step": 2, "kl": 3.0}])
    assert found.points == ((1, 1), (2, 3))


def test_nothing():
    assert curve([]).is_empty and curve([{"step": 1, "other": 2.0}]).is_empty
