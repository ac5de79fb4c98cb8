"""One figure of several variants, each a point with its 95 % interval, one below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from .chart import LETTER, colour, fitting, frame, horizontal_axis, mark, ticks_side_by_side
from .markup import Markup, joined, tag
from .scale import Scale, is_drawable, ticks_covering

_ROW, _TOP, _BOTTOM, _SIDE = 42.0, 0.0, 42.0, 8.0
_MOST_TICKS = 6
_CLEAR = 19.0
"""Of a row: where its letters end."""


@dataclass(frozen=True)
class Estimate:
    """A figure; `low` and `high` are None where no interval was made."""

    label: str
    style: int
    value: float
    low: float | None = None
    high: float | None = None

    def ends(self) -> tuple[float, float] | None:
        """The interval's ends, where it can be drawn."""
        if is_drawable(self.low) and is_drawable(self.high):
            return self.low, self.high  # type: ignore[return-value]
        return None

    def shown(self, decimals: int) -> str:
        """`15.80 (14.86 to 16.74)`."""
        if not is_drawable(self.value):
            return "not finite"
        ends = self.ends()
        interval = f" ({ends[0]:.{decimals}f} to {ends[1]:.{decimals}f})" if ends else ""
        return f"{self.value:.{decimals}f}{interval}"


def interval_chart(
    identifier: str,
    estimates: Sequence[Estimate],
    *,
    title: str,
    unit: str,
    decimals: int,
    reference: Estimate | None = None,
    width: float = 400.0,
) -> Markup | None:
    """The chart, or None where no value is a finite number. A value that is none has a row that says so.

    Args:
        identifier: begins the ids in the chart; unique on the page.
        unit: what the values are: "ROUGE-1, points".
        decimals: of the values beside the labels.
        reference: the one whose value has a line through all rows.
    """
    drawn = [estimate for estimate in estimates if is_drawable(estimate.value)]
    if not drawn:
        return None
    values = [value for estimate in drawn for value in (estimate.value, *(estimate.ends() or ()))]
    ticks = ticks_side_by_side(partial(ticks_covering, min(values), max(values)), _MOST_TICKS, width)
    bottom = _TOP + _ROW * len(estimates)
    x = Scale(ticks[0], ticks[-1], _SIDE, width - _SIDE)
    lines = [(x(tick), "grid") for tick in ticks]
    if reference is not None and is_drawable(reference.value):
        lines.append((x(reference.value), "reference"))
    rows = [_row(estimate, x, _TOP + _ROW * n, lines, decimals, width) for n, estimate in enumerate(estimates)]
    return frame(
        identifier,
        title,
        "; ".join(f"{estimate.label}: {estimate.shown(decimals)}" for estimate in estimates),
        width,
        bottom + _BOTTOM,
        *rows,
        horizontal_axis(x, ticks, bottom, unit, width),
    )


def _row(
    estimate: Estimate, x: Scale, top: float, lines: Sequence[tuple[float, str]], decimals: int, width: float
) -> Markup:
    """Label and figures, and under them the point; the vertical lines leave the letters clear."""
    shown = estimate.shown(decimals)
    label = fitting(estimate.label, width - 2 * _SIDE - LETTER * (len(shown) + 2))
    text = top + 14
    parts = [
        tag("text", label, x=_SIDE, y=text, class_="name"),
        tag("text", shown, x=width - _SIDE, y=text, class_="value", text_anchor="end"),
    ]
    parts += [tag("line", x1=at, x2=at, y1=top + _CLEAR, y2=top + _ROW - 4, class_=class_) for at, class_ in lines]
    if is_drawable(estimate.value):
        y = top + 28
        ends = estimate.ends()
        if ends:
            low, high = x(ends[0]), x(ends[1])
            parts.append(tag("line", x1=low, x2=high, y1=y, y2=y, class_="whisker"))
            parts += [tag("line", x1=end, x2=end, y1=y - 5, y2=y + 5, class_="whisker") for end in (low, high)]
        parts.append(mark(estimate.style, x(estimate.value), y, f"{estimate.label}: {shown}"))
    return tag("g", joined(*parts), class_=colour(estimate.style))
