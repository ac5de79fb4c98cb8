"""Values with their intervals, where they belong."""

from __future__ import annotations

import math

import pytest

from hedgehog.pipeline.report.interval_chart import Estimate, interval_chart


def chart(*estimates, **options):
    values = {"title": "ROUGE-1", "unit": "points", "decimals": 2, **options}
    return interval_chart("x", estimates, **values)


def test_value_and_interval_are_where_they_say(drawn):
    picture = drawn(chart(Estimate("a", 0, 45.0, 41.5, 48.0), Estimate("b", 0, 20.0, 18.0, 22.5)))
    for group, (value, low, high) in zip(picture.all("g"), [(45.0, 41.5, 48.0), (20.0, 18.0, 22.5)], strict=True):
        circle = group.find("circle")
        assert circle is not None
        assert picture.value("x", float(circle.attrib["cx"])) == pytest.approx(value, abs=0.1)
        whisker = next(e for e in group.iter("line") if e.get("class") == "whisker")
        assert picture.value("x", float(whisker.attrib["x1"])) == pytest.approx(low, abs=0.1)
        assert picture.value("x", float(whisker.attrib["x2"])) == pytest.approx(high, abs=0.1)
    values = [value for _, value in picture.ticks("x")]
    assert values[0] <= 18 and values[-1] >= 48


def test_the_reference_runs_through_every_row(drawn):
    estimates = [Estimate("a", 0, 45.0, 41.5, 48.0), Estimate("b", 1, 20.0)]
    picture = drawn(chart(*estimates, reference=estimates[1]))
    lines = picture.all("line", "reference")
    assert len(lines) == 2
    assert all(picture.value("x", float(line.attrib["x1"])) == pytest.approx(20.0, abs=0.1) for line in lines)
    assert not drawn(chart(*estimates)).all("line", "reference")


def test_no_line_crosses_the_letters(drawn):
    estimates = [Estimate(f"v{number}", number, 10.0 + number, 9.0, 20.0) for number in range(4)]
    picture = drawn(chart(*estimates, reference=estimates[0]))
    baselines = [float(text.attrib["y"]) for text in picture.all("text", "name")]
    for line in (*picture.all("line", "grid"), *picture.all("line", "reference")):
        top, bottom = float(line.attrib["y1"]), float(line.attrib["y2"])
        assert not any(top < baseline + 3 and bottom > baseline - 9 for baseline in baselines)


def test_without_an_interval_there_is_a_point_alone(drawn):
    picture = drawn(chart(Estimate("a", 0, 45.0), Estimate("b", 0, 20.0, math.nan, 30.0)))
    assert len(picture.all("circle", "mark")) == 2 and not picture.all("line", "whisker")
    assert "45.00" in picture.texts() and "20.00" in picture.texts()


def test_a_value_that_is_not_finite_says_so(drawn):
    picture = drawn(chart(Estimate("a", 0, math.inf, 1.0, math.inf), Estimate("b", 0, 2.0)))
    assert "not finite" in picture.texts() and len(picture.all("circle", "mark")) == 1
    assert "a: not finite; b: 2.00" in picture.described()
    assert chart(Estimate("a", 0, math.nan)) is None and chart() is None


def test_long_labels_leave_room_for_the_figures(drawn):
    picture = drawn(chart(Estimate("a label that goes on & on " * 4, 0, 45.37, 41.84, 48.53)))
    name, value = picture.all("text", "name")[0], picture.all("text", "value")[0]
    assert (name.text or "").endswith("…")
    end = float(name.attrib["x"]) + 7.0 * len(name.text or "")
    assert end < float(value.attrib["x"]) - 7.0 * len(value.text or "")


def test_one_value_alone(drawn):
    picture = drawn(chart(Estimate("a", 0, 45.0, 45.0, 45.0)))
    assert picture.value("x", float(picture.all("circle", "mark")[0].attrib["cx"])) == pytest.approx(45.0, abs=0.1)
