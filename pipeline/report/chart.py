"""What all charts share: the frame for eyes and screen readers, axes, text that fits, marks and dashes of a series.

Sizes are pixels of the chart's own width; a page shows a chart no larger than that, and smaller where it is narrow.
A series has a colour (class `s0`, `s1` … of the page's style), and a dash pattern and a shape for those who see no
colour or print without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .markup import Markup, escaped, joined, tag
from .scale import Scale, tick_labels

NUM_COLOURS = 6
DASHES = (None, "7 4", "2 3", "10 3 2 3", "16 5 2 5 2 5", "4 2")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "wedge")
LETTER = 7.0
"""Width of a letter of 12 pixels, on the generous side."""


def frame(identifier: str, title: str, description: str, width: float, height: float, *content: Markup) -> Markup:
    """A whole chart.

    Args:
        identifier: begins the ids of its title and description; no other chart on the page may have it.
        description: what it shows, for who does not see it.
    """
    return tag(
        "svg",
        tag("title", title, id=f"{identifier}-title"),
        tag("desc", description, id=f"{identifier}-desc"),
        *content,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_labelledby=f"{identifier}-title {identifier}-desc",
        style=f"max-width:{width:g}px",
        xmlns="http://www.w3.org/2000/svg",
    )


def left_margin(ticks: Sequence[float]) -> float:
    """Room that the labels of a vertical axis take, and the gap behind them."""
    return LETTER * max(len(label) for label in tick_labels(ticks)) + 10


def vertical_axis(scale: Scale, ticks: Sequence[float], left: float, right: float, label: str) -> Markup:
    """Grid lines with their values, and above them what they are."""
    parts = [tag("text", label, x=0, y=13, class_="axis-label")]
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        y = scale(tick)
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", text, x=left - 6, y=y + 4, class_="tick", text_anchor="end"))
    return joined(*parts)


def horizontal_axis(scale: Scale, ticks: Sequence[float], bottom: float, label: str, width: float) -> Markup:
    """The axis line, ticks with their values (none beyond the chart's width), and below them what they are."""
    parts = [tag("line", x1=scale.start, x2=scale.end, y1=bottom, y2=bottom, class_="axis")]
    for tick, text in zip(ticks, tick_labels(ticks), strict=True):
        x, half = scale(tick), LETTER * len(text) / 2
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        middle = min(max(x, half), width - half)
        parts.append(tag("text", text, x=round(middle, 2), y=bottom + 17, class_="tick", text_anchor="middle"))
    middle = (scale.start + scale.end) / 2
    parts.append(tag("text", label, x=middle, y=bottom + 34, class_="axis-label", text_anchor="middle"))
    return joined(*parts)


def ticks_side_by_side(make: Callable[[int], list[float]], most: int, width: float) -> list[float]:
    """As many ticks, `most` at most, as have room for their labels beside each other.

    Args:
        make: ticks, no more than it is given (3 or more).
    """
    for number in range(most, 3, -1):
        ticks = make(number)
        if LETTER * len(ticks) * (2 + max(map(len, tick_labels(ticks)), default=0)) <= width:
            return ticks
    return make(3)


def fitting(text: str, width: float) -> str:
    """The text, cut with … where it would take more than `width`."""
    most = max(1, int(width / LETTER))
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def colour(style: int) -> str:
    """Class of a series' colour."""
    return f"s{style % NUM_COLOURS}"


def dash(style: int) -> str | None:
    """Dash pattern of a series; it differs also where the colours begin anew."""
    return DASHES[(style + style // NUM_COLOURS) % len(DASHES)]


def mark(style: int, x: float, y: float, hint: str | None = None, size: float = 4.5) -> Markup:
    """A point of a series, in its shape; `hint` is shown where the pointer rests."""
    title = tag("title", hint) if hint is not None else None
    shape = SHAPES[(style + style // NUM_COLOURS) % len(SHAPES)]
    if shape == "circle":
        return tag("circle", title, cx=x, cy=y, r=size, class_="mark")
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "cross": [
            (math.cos(k * math.pi / 4) * (1.7 if k % 2 else 0.6), math.sin(k * math.pi / 4) * (1.7 if k % 2 else 0.6))
            for k in range(8)
        ],
        "wedge": [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
    }[shape]
    points = " ".join(f"{x + size * dx:.2f},{y + size * dy:.2f}" for dx, dy in corners)
    return tag("polygon", title, points=points, class_="mark")


def legend(entries: Sequence[tuple[str, int]]) -> Markup:
    """Labels of lines beside what they look like, in HTML: it wraps, however long they are."""
    items = []
    for label, style in entries:
        swatch = tag(
            "svg",
            tag("line", x1=1, x2=33, y1=8, y2=8, class_="line", stroke_dasharray=dash(style)),
            mark(style, 17.0, 8.0, size=4.0),
            viewBox="0 0 34 16",
            class_=f"swatch {colour(style)}",
            aria_hidden="true",
            xmlns="http://www.w3.org/2000/svg",
        )
        items.append(tag("li", swatch, escaped(label)))
    return tag("ul", *items, class_="legend")
