"""Curves by step: the points thin, their running mean thick where they are many, validation points as marks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from .chart import colour, dash, frame, horizontal_axis, left_margin, mark, ticks_side_by_side, vertical_axis
from .curve import Curve, Point
from .markup import Markup, joined, tag
from .scale import Scale, ticks_covering, ticks_within

_TOP, _BOTTOM, _RIGHT = 26.0, 42.0, 12.0
_MOST_TICKS = 8


def line_chart(
    identifier: str,
    curves: Sequence[Curve],
    *,
    title: str,
    unit: str,
    from_zero: bool = False,
    width: float = 720.0,
    height: float = 300.0,
) -> Markup | None:
    """The chart of the curves that have points, or None where none has.

    Args:
        identifier: begins the ids in the chart; unique on the page.
        unit: what the values are: "KL, nats".
        from_zero: whether the vertical axis begins at zero, where the values are positive.
    """
    curves = [curve for curve in curves if not curve.is_empty]
    if not curves:
        return None
    values = [value for curve in curves for _, value in (*curve.points, *curve.marks)]
    steps = [step for curve in curves for step, _ in (*curve.points, *curve.marks)]
    low = min(0.0, min(values)) if from_zero else min(values)
    y_ticks = ticks_covering(low, max(values), _MOST_TICKS)
    left, bottom = left_margin(y_ticks), height - _BOTTOM
    first, last = min(0.0, min(steps)), max(steps)
    x = Scale(first, last if last > first else first + 1, left, width - _RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], bottom, _TOP)
    x_ticks = ticks_side_by_side(partial(ticks_within, x.low, x.high, whole=True), _MOST_TICKS, x.end - x.start)
    return frame(
        identifier,
        title,
        "; ".join(_described(curve) for curve in curves),
        width,
        height,
        vertical_axis(y, y_ticks, left, width - _RIGHT, unit),
        horizontal_axis(x, x_ticks, bottom, "optimizer step", width),
        *(_drawn(curve, x, y) for curve in curves),
    )


def _drawn(curve: Curve, x: Scale, y: Scale) -> Markup:
    lines = [_line(curve.points, x, y, "raw" if curve.smooth else "line", None if curve.smooth else dash(curve.style))]
    if curve.smooth:
        lines.append(_line(curve.smooth, x, y, "line", dash(curve.style)))
    marks = [
        mark(curve.style, x(step), y(value), f"{curve.label}: {value:.4g} on validation, step {step:,.0f}")
        for step, value in curve.marks
    ]
    return tag("g", joined(*lines, *marks), class_=colour(curve.style))


def _line(points: Sequence[Point], x: Scale, y: Scale, class_: str, dashes: str | None) -> Markup | None:
    if len(points) == 1:  # a line of one point shows nothing
        return tag("circle", cx=x(points[0][0]), cy=y(points[0][1]), r=2.5, class_="dot")
    if not points:
        return None
    path = " ".join(f"{x(step):g},{y(value):g}" for step, value in points)
    return tag("polyline", points=path, class_=class_, stroke_dasharray=dashes)


def _described(curve: Curve) -> str:
    parts = []
    ends = curve.smooth or curve.points
    if ends:
        (first, at_first), (last, at_last) = ends[0], ends[-1]
        parts.append(f"from {at_first:.4g} at step {first:,.0f} to {at_last:.4g} at step {last:,.0f}")
    if curve.marks:
        step, value = curve.marks[-1]
        parts.append(f"{value:.4g} on validation at step {step:,.0f}")
    return f"{curve.label}: {', '.join(parts)}"
