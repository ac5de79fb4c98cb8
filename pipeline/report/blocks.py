"""The pieces that sections are made of: prose, tables, figures, what folds away."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .markup import Content, Markup, joined, tag

_LONGEST_NAME = 80


def section(identifier: str, title: str, *content: Content) -> Markup:
    """A part of the page with a heading."""
    return tag("section", tag("h2", title), *content, id=identifier)


def prose(text: str, class_: str | None = None) -> Markup:
    """A paragraph; what stands in `backticks` is code."""
    parts = re.split(r"`([^`]*)`", text)
    content = (tag("code", part) if number % 2 else part for number, part in enumerate(parts))
    return tag("p", *content, class_=class_)


def in_line(name: str) -> str:
    """A name from the data within `prose`, of which no part may become code; long ones are cut."""
    name = " ".join(name.split()).replace("`", "'")
    return f"“{name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + '…'}”"


def notes(lines: Sequence[str]) -> Markup | None:
    """Small print; None where there is none."""
    return prose(" ".join(lines), "note") if lines else None


def table(columns: Sequence[str], rows: Sequence[Sequence[Content]], *, caption: str, num_texts: int = 1) -> Markup:
    """A table that scrolls within itself where the page is narrower.

    Args:
        caption: for screen readers.
        num_texts: how many columns from the left hold text; the others hold numbers, and stand to the right.
    """
    classes = [None if index < num_texts else "number" for index in range(len(columns))]
    # "ROUGE-2" would be broken at its hyphen
    whole = ["whole" if " " not in column and index >= num_texts else None for index, column in enumerate(columns)]
    head = tag(
        "tr",
        *(
            tag("th", text, scope="col", class_=" ".join(filter(None, both)) or None)
            for text, *both in zip(columns, classes, whole, strict=True)
        ),
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=c) for cell, c in zip(row[1:], classes[1:], strict=True)),
        )
        for row in rows
    ]
    content = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    # by keyboard what scrolls is reached only where it can have the focus
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=caption)


def figure(title: str, *content: Content, note: Sequence[str] = ()) -> Markup:
    """A chart with what it shows above it and how to read it below."""
    return tag("figure", tag("figcaption", title), *content, notes(note))


def wide_and_narrow(wide: Markup | None, narrow: Markup | None) -> Markup:
    """One chart in two shapes, of which the page's style shows the one that fits: letters keep their size."""
    return joined(tag("div", wide, class_="wide"), tag("div", narrow, class_="narrow"))


def folded(title: str, *content: Content) -> Markup:
    """What opens at a click, and is open in print."""
    return tag("details", tag("summary", title), *content)


def count(number: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
