"""A figure by step, as a chart can hold it: thousands of steps become a few hundred points and a smooth line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .scale import is_drawable

Point = tuple[float, float]
"""Step and value."""

MAX_POINTS = 300
"""Of a line; what a screen can show, and what keeps the file small."""
MAX_MARKS = 16
"""Validation points of a line."""
_SMOOTH_FROM = 50
"""Fewer points are seen without a smooth line."""
_WINDOWS = 20
"""The smooth line's window is this part of the whole."""


@dataclass(frozen=True)
class Curve:
    """What is drawn of one figure."""

    label: str
    style: int
    """Place in the palette: the same for a variant in every chart."""
    points: tuple[Point, ...]
    """Ordered by step; each is a mean over `steps_per_point` neighbouring records."""
    steps_per_point: int = 1
    smooth: tuple[Point, ...] = ()
    """Running mean of the points; empty where they are few."""
    smooth_steps: int = 0
    """Records under the running mean."""
    marks: tuple[Point, ...] = ()
    """Validation points, single ones as measured."""
    num_marks: int = 0
    """How many there are in the files."""
    num_left_out: int = 0
    """Values that are no finite number."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.points and not self.marks


def read_curve(label: str, style: int, records: Iterable[Mapping[str, Any]], name: str, mark: str) -> Curve:
    """The curve of metric `name` and the marks of metric `mark` in a metrics.jsonl's records.

    A step that was recorded twice counts as it was recorded last. Values that are NaN, infinite or no numbers are left
    out and counted.
    """
    records = list(records)
    values, bad_values = _by_step(records, name)
    marks, bad_marks = _by_step(records, mark)
    points, size = _means(values)
    curve = Curve(
        label,
        style,
        points,
        size,
        marks=_evenly_chosen(marks, MAX_MARKS),
        num_marks=len(marks),
        num_left_out=bad_values + bad_marks,
    )
    window = len(points) // _WINDOWS
    if len(points) < _SMOOTH_FROM or window < 2:
        return curve
    window += 1 - window % 2  # as many points on either side
    return replace(curve, smooth=_running_mean(points, window), smooth_steps=window * size)


def _by_step(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[Point], int]:
    """Points in the order of their steps, and how many values were left out."""
    found: dict[float, float] = {}
    num_bad = 0
    for record in records:
        if name not in record:
            continue
        step, value = record.get("step"), record[name]
        if is_drawable(step) and is_drawable(value):
            found[float(step)] = float(value)  # type: ignore[arg-type]
        else:
            num_bad += 1
    return sorted(found.items()), num_bad


def _means(points: Sequence[Point]) -> tuple[tuple[Point, ...], int]:
    """At most MAX_POINTS means over as many neighbours each (fewer in the last), and how many that is."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return tuple(_mean(group) for group in groups), size


def _running_mean(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """At the ends over what there is on both sides alike, so that the line neither lags nor leads."""
    smooth = []
    for index, (step, _) in enumerate(points):
        reach = min(window // 2, index, len(points) - 1 - index)
        smooth.append((step, _mean(points[index - reach : index + reach + 1])[1]))
    return tuple(smooth)


def _mean(points: Sequence[Point]) -> Point:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def _evenly_chosen(points: Sequence[Point], most: int) -> tuple[Point, ...]:
    """The first, the last and some between, where there are too many."""
    if len(points) <= most:
        return tuple(points)
    return tuple(points[round(number * (len(points) - 1) / (most - 1))] for number in range(most))
