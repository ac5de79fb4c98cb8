"""Bars as high as their values."""

from __future__ import annotations

import itertools
import math

import pytest

from hedgehog.pipeline.report.bar_chart import Bar, bar_chart


def chart(*bars, highest=2.0, **options):
    return bar_chart("x", bars, title="KL", unit="nats", style=0, highest=highest, **options)


def test_bars_stand_on_zero_and_end_at_their_values(drawn):
    picture = drawn(chart(Bar(0, 0.5, 0.25, 1.0), Bar(1, 1.5, 1.0, 2.0), Bar(2, 0.75)))
    bars, heads = picture.all("rect"), picture.all("line", "heads")
    for bar, value in zip(bars, (0.5, 1.5, 0.75), strict=True):
        top, height = float(bar.attrib["y"]), float(bar.attrib["height"])
        assert picture.value("y", top) == pytest.approx(value, abs=0.02)
        assert picture.value("y", top + height) == pytest.approx(0.0, abs=0.02)
    ends = [tuple(picture.value("y", float(line.attrib[y])) for y in ("y1", "y2")) for line in heads]
    assert ends == [pytest.approx((0.25, 1.0), abs=0.02), pytest.approx((1.0, 2.0), abs=0.02)]
    assert bars[0].attrib["width"] == bars[2].attrib["width"]


def test_a_bar_stands_over_its_layer_also_where_others_are_missing(drawn):
    picture = drawn(chart(*(Bar(layer, 1.0) for layer in (8, 9, 13, 14, 15))))
    middles = [float(bar.attrib["x"]) + float(bar.attrib["width"]) / 2 for bar in picture.all("rect")]
    assert [picture.value("x", middle) for middle in middles] == pytest.approx([8, 9, 13, 14, 15], abs=0.02)


def test_panels_of_the_same_height_have_the_same_axis(drawn):
    low, high = drawn(chart(Bar(0, 0.1), highest=1.9)), drawn(chart(Bar(0, 1.9), highest=1.9))
    assert low.ticks("y") == high.ticks("y")


@pytest.mark.parametrize("num_layers", [1, 3, 32, 80, 126])
def test_bars_do_not_overlap_and_labels_neither(drawn, num_layers):
    picture = drawn(chart(*(Bar(layer, 1.0) for layer in range(num_layers))))
    edges = [(float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in picture.all("rect")]
    assert all(x0 + width < x1 for (x0, width), (x1, _) in itertools.pairwise(edges))
    axis = picture.all("line", "axis")[0]
    assert float(axis.attrib["x1"]) <= edges[0][0] and sum(edges[-1]) <= float(axis.attrib["x2"])
    labels = [pixel for pixel, _ in picture.ticks("x")]
    assert all(b - a > 20 for a, b in itertools.pairwise(labels))


def test_negative_and_missing_values(drawn):
    picture = drawn(chart(Bar(0, -0.5), Bar(1, math.nan), Bar(2, 1.0)))
    assert len(picture.all("rect")) == 2
    below = picture.all("rect")[0]
    assert picture.value("y", float(below.attrib["y"])) == pytest.approx(0.0, abs=0.02)
    assert chart(Bar(0, math.nan)) is None and chart() is None


def test_all_zero(drawn):
    picture = drawn(chart(Bar(0, 0.0), highest=0.0))
    assert picture.all("rect")[0].attrib["height"] == "0"
