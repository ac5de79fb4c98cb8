"""A point is drawn where its value says."""

from __future__ import annotations

import itertools
import math

import pytest

from hedgehog.pipeline.report.curve import read_curve
from hedgehog.pipeline.report.line_chart import line_chart


def chart(*series, from_zero=False, **size):
    curves = [
        read_curve(f"series {style}", style, [{"step": s, "v": v, "m": m} for s, v, m in points], "v", "m")
        for style, points in enumerate(series)
    ]
    return line_chart("x", curves, title="Loss & more", unit="nats", from_zero=from_zero, **size)


def falling(num):
    return [(step, 5 / step, 5 / step + 0.5) for step in range(1, num + 1)]


@pytest.mark.parametrize("width", [360.0, 832.0])
def test_points_and_marks_are_where_their_values_say(drawn, width):
    picture = drawn(chart(falling(12), width=width))
    (line,) = picture.all("polyline")
    pixels = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    for (x, y), (step, value, _) in zip(pixels, falling(12), strict=True):
        assert picture.value("x", x) == pytest.approx(step, abs=0.02)
        assert picture.value("y", y) == pytest.approx(value, abs=0.02)
    marks = picture.all("circle", "mark")
    assert len(marks) == 12
    for mark, (step, _, value) in zip(marks, falling(12), strict=True):
        assert picture.value("x", float(mark.attrib["cx"])) == pytest.approx(step, abs=0.02)
        assert picture.value("y", float(mark.attrib["cy"])) == pytest.approx(value, abs=0.02)
        assert mark.findtext("title") == f"series 0: {value:.4g} on validation, step {step}"


def test_everything_lies_inside_the_chart(drawn):
    picture = drawn(chart(falling(1000), [(step, -100000.0 * step, math.nan) for step in (1, 700)], width=360.0))
    for line in picture.all("polyline"):
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= picture.width and 0 <= y <= picture.height
    grid = [float(line.attrib["y1"]) for line in picture.all("line", "grid")]
    label = float(picture.all("text", "axis-label")[0].attrib["y"])
    assert min(grid) > label + 5 and max(grid) == float(picture.all("line", "axis")[0].attrib["y1"])
    letter = 7.2  # of 12 pixels, in a wide font
    for text in picture.all("text"):
        length = letter * len(text.text or "")
        before = {"end": 1.0, "middle": 0.5}.get(text.get("text-anchor", ""), 0.0) * length
        start = float(text.attrib["x"]) - before
        assert start >= -3 and start + length <= picture.width + 3, text.text


def test_labels_of_an_axis_do_not_touch(drawn):
    for last in (3, 90, 1234, 123456, 9999999):
        picture = drawn(chart([(1, 1.0, None), (last, 2.0, None)], width=360.0))
        labels = [e for e in picture.all("text", "tick") if e.get("text-anchor") == "middle"]
        ends = [(float(e.attrib["x"]), 3.5 * len(e.text or "")) for e in labels]
        for (x0, half0), (x1, half1) in itertools.pairwise(ends):
            assert x0 + half0 + 4 < x1 - half1, last


def test_many_points_get_a_smooth_line_over_the_raw_one(drawn):
    picture = drawn(chart(falling(1000)))
    raw, smooth = picture.all("polyline", "raw"), picture.all("polyline", "line")
    assert (len(raw), len(smooth)) == (1, 1)
    assert len(smooth[0].attrib["points"].split()) <= 300


def test_series_differ_without_colour(drawn):
    picture = drawn(chart(*[falling(5)] * 9))
    groups = picture.all("g")
    assert len(groups) == 9
    looks = set()
    for group in groups:
        line, mark = group.find("polyline"), group[1]
        points = mark.attrib.get("points", "")
        looks.add((group.get("class"), line.get("stroke-dasharray"), mark.tag, len(points.split())))  # type: ignore[union-attr]
    assert len({(colour, dashes) for colour, dashes, _, _ in looks}) == 9
    assert len({(colour, *shape) for colour, _, *shape in looks}) == 9
    assert len({dashes for _, dashes, _, _ in looks}) == 6


def test_one_point_is_seen(drawn):
    picture = drawn(chart([(7, 2.0, None)]))
    (dot,) = picture.all("circle", "dot")
    assert picture.value("y", float(dot.attrib["cy"])) == pytest.approx(2.0, abs=0.01)
    assert picture.value("x", float(dot.attrib["cx"])) == pytest.approx(7, abs=0.05)
    at_zero = drawn(chart([(0, 0.0, None)]))
    assert len(at_zero.all("circle", "dot")) == 1


def test_a_constant_series_is_a_level_line_inside(drawn):
    picture = drawn(chart([(step, 3.0, None) for step in range(1, 9)]))
    heights = {pair.split(",")[1] for pair in picture.all("polyline")[0].attrib["points"].split()}
    assert len(heights) == 1
    assert picture.value("y", float(heights.pop())) == pytest.approx(3.0, abs=0.01)


def test_from_zero_or_from_the_data(drawn):
    series = [(step, 10.0 + 0.1 * step, None) for step in range(1, 9)]
    assert min(value for _, value in drawn(chart(series)).ticks("y")) > 9
    assert min(value for _, value in drawn(chart(series, from_zero=True)).ticks("y")) == 0


def test_nothing_to_draw():
    assert chart() is None and chart([]) is None
    assert chart([(1, math.nan, math.inf)]) is None


def test_a_screen_reader_is_told_title_and_ends(drawn):
    picture = drawn(chart(falling(4)))
    assert picture.root.findtext("title") == "Loss & more"
    said = picture.described()
    assert "series 0: from 5 at step 1 to 1.25 at step 4, 1.75 on validation at step 4" in said
    ids = picture.root.attrib["aria-labelledby"].split()
    assert ids == [picture.root.find("title").attrib["id"], picture.root.find("desc").attrib["id"]]  # type: ignore[union-attr]
    assert picture.root.attrib["role"] == "img" and "nats" in picture.texts() and "optimizer step" in picture.texts()
