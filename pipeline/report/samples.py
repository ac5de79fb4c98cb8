"""What the sections that show single test rows share: which rows, their texts, and what a conversion made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import prose
from .chart import colour
from .markup import Markup, tag
from .run_files import RunFiles

_MAX_TEXT = 2000
"""Characters; a long text is told by its beginning."""
_MAX_ANSWER = 1500


def choose(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Rows evenly spaced among those that are not in train; where these are too few, first ones that are."""
    unseen = [row for row in rows if not row.get("seen_in_train")]
    seen = [row for row in rows if row.get("seen_in_train")]
    if len(unseen) <= most:
        return [*unseen, *seen[: most - len(unseen)]]
    return [unseen[(2 * number + 1) * len(unseen) // (2 * most)] for number in range(most)]


def example_of(
    examples: Sequence[Mapping[str, Any]] | str, row: Mapping[str, Any], what: str, same: Mapping[str, str]
) -> Mapping[str, Any] | Markup:
    """prepare's row of a row that evaluate wrote, where prepare's file still holds what evaluate saw; else why not.

    An id alone proves nothing: many data sets number their rows, so that another one has the same.

    Args:
        examples: the test split, or why it cannot be read.
        what: what is to be shown of it: "dialogue". Its key, too.
        same: keys of prepare's row to those of evaluate's that must have the same value beside the id.
    """
    if isinstance(examples, str):
        return prose(f"The {what} is not shown: {examples}.", "note")
    example = examples[row["index"]] if 0 <= row["index"] < len(examples) else {}
    if not isinstance(example.get(what), str):
        return prose(f"The {what} is not shown: prepare's file of test rows does not have it.", "note")
    if any(example.get(ours) != row.get(theirs) for ours, theirs in {"id": "id", **same}.items()):
        why = f"prepare's test row of this number has another id or {' or '.join(same)} than the one that evaluate saw"
        return prose(f"The {what} is not shown: {why}.", "note")
    return example


def quoted(text: str) -> Markup:
    """A text from the data, or its beginning."""
    more = tag("em", " … [cut here]") if len(text) > _MAX_TEXT else None
    return tag("blockquote", text[:_MAX_TEXT], more, dir="auto")


def answer(text: Any, more: Markup | None = None) -> Markup:
    """A summary or a label, in a list of definitions."""
    text = str(text or "").strip()
    cut = "…" if len(text) > _MAX_ANSWER else ""
    return tag("dd", text[:_MAX_ANSWER] + cut if text else tag("em", "(nothing)"), more, dir="auto")


def conversion(run: RunFiles, name: str) -> Markup:
    """Whose answer follows, with the colour that it has in the charts."""
    return tag("dt", tag("span", class_="patch", aria_hidden="true"), run.labels[name], class_=colour(run.style(name)))
