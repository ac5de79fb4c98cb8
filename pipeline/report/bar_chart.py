"""A figure of every layer as a bar, with a thin line from its best to its worst head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from .chart import colour, frame, horizontal_axis, left_margin, ticks_side_by_side, vertical_axis
from .markup import Markup, joined, tag
from .scale import Scale, is_drawable, ticks_covering, ticks_within

_TOP, _BOTTOM, _RIGHT = 26.0, 42.0, 8.0
_MOST_TICKS = 12


@dataclass(frozen=True)
class Bar:
    """One layer's mean over its heads, and its best and worst head (None where unknown)."""

    layer: int
    value: float
    low: float | None = None
    high: float | None = None

    def values(self) -> list[float]:
        """Those of the three that can be drawn."""
        return [value for value in (self.value, self.low, self.high) if is_drawable(value)]  # type: ignore[misc]


def bar_chart(
    identifier: str,
    bars: Sequence[Bar],
    *,
    title: str,
    unit: str,
    style: int,
    highest: float,
    width: float = 400.0,
    height: float = 220.0,
) -> Markup | None:
    """The chart, or None where no bar can be drawn.

    Args:
        identifier: begins the ids in the chart; unique on the page.
        unit: what the values are: "KL, nats".
        highest: the largest value of all charts that are to be compared with this one: they get the same axis.
    """
    drawn = [bar for bar in bars if is_drawable(bar.value)]
    if not drawn:
        return None
    lowest = min(0.0, *(value for bar in drawn for value in bar.values()))
    y_ticks = ticks_covering(lowest, highest, 5)
    left, bottom = left_margin(y_ticks), height - _BOTTOM
    first, last = min(bar.layer for bar in drawn), max(bar.layer for bar in drawn)
    x = Scale(first - 0.5, last + 0.5, left, width - _RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], bottom, _TOP)
    x_ticks = ticks_side_by_side(partial(ticks_within, x.low, x.high, whole=True), _MOST_TICKS, x.end - x.start)
    thick = 0.72 * (x.end - x.start) / (last - first + 1)
    return frame(
        identifier,
        title,
        ", ".join(f"layer {bar.layer}: {bar.value:.4g}" for bar in drawn),
        width,
        height,
        vertical_axis(y, y_ticks, left, width - _RIGHT, unit),
        tag("g", *(_bar(bar, x, y, min(thick, 60.0)) for bar in drawn), class_=colour(style)),
        horizontal_axis(x, x_ticks, bottom, "layer", width),
    )


def _bar(bar: Bar, x: Scale, y: Scale, thick: float) -> Markup:
    middle, top, floor = x(bar.layer), y(max(bar.value, 0.0)), y(min(bar.value, 0.0))
    ends = len(bar.values()) == 3
    hint = f"layer {bar.layer}: {bar.value:.4g}" + (f" (heads {bar.low:.4g} to {bar.high:.4g})" if ends else "")
    parts = [tag("rect", x=middle - thick / 2, y=top, width=thick, height=floor - top, class_="bar")]
    if ends:
        low, high = y(bar.low), y(bar.high)  # type: ignore[arg-type]
        parts.append(tag("line", x1=middle, x2=middle, y1=low, y2=high, class_="heads"))
    return tag("g", tag("title", hint), joined(*parts))
