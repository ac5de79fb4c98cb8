"""Round numbers that cover a range, and where a value lies."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from hedgehog.pipeline.report.scale import Scale, is_drawable, tick_labels, ticks_covering, ticks_within


def ranges() -> list[tuple[float, float]]:
    drawn = random.Random(5)
    found = [(0.0, 1.0), (0.0, 5008.0), (0.2, 0.3), (-3.0, 2.0), (1e-9, 3e-9), (1e12, 3e12), (0.999, 1.001)]
    for _ in range(300):
        low = drawn.uniform(-1, 1) * 10 ** drawn.uniform(-8, 8)
        found.append((low, low + max(10 ** drawn.uniform(-4, 9), 1e-6 * abs(low))))
    return found


@pytest.mark.parametrize("most", [3, 5, 6, 8])
def test_ticks_cover_the_range_evenly_and_are_few(most):
    for low, high in ranges():
        ticks = ticks_covering(low, high, most)
        step = ticks[1] - ticks[0]
        assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= high - 1e-6 * step
        assert 2 <= len(ticks) <= most
        assert all(math.isclose(b - a, step, rel_tol=1e-6) for a, b in itertools.pairwise(ticks))
        # no whole step is wasted on either side
        assert ticks[1] > low - 1e-6 * step and ticks[-2] < high + 1e-6 * step


def test_most_of_the_room_is_used():
    for low, high in ranges():
        ticks = ticks_covering(low, high, 8)
        assert (high - low) / (ticks[-1] - ticks[0]) > 0.4, (low, high, ticks)


def test_ticks_are_round():
    for low, high in ranges():
        step = ticks_covering(low, high)[1] - ticks_covering(low, high)[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - round_one) for round_one in (1, 2, 2.5, 5)) < 1e-3, (low, high, step)


def test_a_constant_has_room_on_both_sides():
    for value in (0.0, 3.0, -2.5, 1e9, 1e9 + 1e-7):
        ticks = ticks_covering(value, value)
        assert ticks[0] < value < ticks[-1]
    nearly = ticks_covering(1e9, 1e9 + 1e-7)
    assert len(set(tick_labels(nearly))) == len(nearly)


def test_ticks_within_stay_inside_and_count_whole_steps():
    assert ticks_within(0, 150, 8, whole=True) == [0, 20, 40, 60, 80, 100, 120, 140]
    assert ticks_within(0, 3, 12, whole=True) == [0, 1, 2, 3]
    assert ticks_within(-0.5, 31.5, 10, whole=True) == [0, 5, 10, 15, 20, 25, 30]


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([0.0, 0.5, 1.0], ["0.0", "0.5", "1.0"]),
        ([0.0, 2500.0, 5000.0], ["0", "2,500", "5,000"]),
        ([-1.0, 0.0, 1.0], ["-1", "0", "1"]),
        ([0.0, 1e-8, 2e-8], ["0", "1e-08", "2e-08"]),
        ([2e9, 3e9], ["2e+09", "3e+09"]),
        ([5.0], ["5"]),
    ],
)
def test_labels_have_the_digits_that_tell_ticks_apart(ticks, labels):
    assert tick_labels(ticks) == labels


def test_labels_differ():
    for low, high in ranges():
        ticks = ticks_covering(low, high)
        labels = tick_labels(ticks)
        assert len(set(labels)) == len(ticks), (low, high, labels)


def test_a_scale_goes_through_its_ends():
    scale = Scale(10.0, 20.0, 300.0, 100.0)
    assert (scale(10), scale(20), scale(15), scale(12.5)) == (300, 100, 200, 250)


def test_what_can_be_drawn():
    assert is_drawable(1) and is_drawable(-2.5)
    for value in (math.nan, math.inf, -math.inf, 1e308, 10**400, True, "1", None, [1]):
        assert not is_drawable(value)
