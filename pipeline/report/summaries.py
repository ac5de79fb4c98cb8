"""A handful of test dialogues with the reference and what every variant made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import notes, prose, section
from .chart import colour
from .markup import Markup, joined, tag
from .run_files import RunFiles, read_dialogues, read_predictions

NUM_DIALOGUES = 5
_MAX_DIALOGUE = 2000
"""Characters; a long dialogue is told by its beginning."""
_MAX_SUMMARY = 1500


def summaries(run: RunFiles) -> Markup:
    """The section; where there are no summaries, what makes them."""
    evaluate = run.folder.stage("evaluate")
    found = {name: read_predictions(evaluate, name) for name in run.labels}
    unreadable = [prose(f"{why}.", "warning") for why in found.values() if isinstance(why, str)]
    predictions = {name: rows for name, rows in found.items() if rows and not isinstance(rows, str)}
    if not predictions:
        none = prose(f"None yet: evaluate has written no predictions.{run.what_makes('them')}")
        return section("summaries", "Summaries", *(unreadable or [none]))
    common = set.intersection(*(set(rows) for rows in predictions.values()))
    first = next(iter(predictions.values()))
    chosen = choose([first[index] for index in sorted(common)], NUM_DIALOGUES)
    dialogues = read_dialogues(run.whole("prepare"))
    return section(
        "summaries",
        "Summaries",
        *unreadable,
        *(_article(run, row, _dialogue(dialogues, row), predictions) for row in chosen),
        notes([_how_chosen(chosen, len(common))]),
    )


def choose(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Rows evenly spaced among those that are not in train; where these are too few, first ones that are."""
    unseen = [row for row in rows if not row.get("seen_in_train")]
    seen = [row for row in rows if row.get("seen_in_train")]
    if len(unseen) <= most:
        return [*unseen, *seen[: most - len(unseen)]]
    return [unseen[(2 * number + 1) * len(unseen) // (2 * most)] for number in range(most)]


def _how_chosen(chosen: Sequence[dict[str, Any]], num_rows: int) -> str:
    num_seen = sum(bool(row.get("seen_in_train")) for row in chosen)
    which = f"; {num_seen} of them stand in train" if num_seen else ", none of which stands in train"
    return f"{len(chosen)} of {num_rows:,} test dialogues, evenly spaced whatever came out{which}."


def _dialogue(dialogues: Sequence[Mapping[str, Any]] | str, row: Mapping[str, Any]) -> Markup:
    """The row's dialogue, where prepare's file still holds what evaluate saw; else why it is not shown.

    An id alone proves nothing: many data sets number their rows, so that another one has the same.
    """
    if isinstance(dialogues, str):
        return prose(f"The dialogue is not shown: {dialogues}.", "note")
    example = dialogues[row["index"]] if 0 <= row["index"] < len(dialogues) else {}
    text = example.get("dialogue")
    if not isinstance(text, str):
        return prose("The dialogue is not shown: prepare's file of test rows does not have it.", "note")
    if (example.get("id"), example.get("summary")) != (row.get("id"), row.get("reference")):
        why = "prepare's test row of this number has another id or summary than the one that evaluate saw"
        return prose(f"The dialogue is not shown: {why}.", "note")
    return _shortened(text)


def _article(
    run: RunFiles, row: Mapping[str, Any], dialogue: Markup, predictions: Mapping[str, Mapping[int, dict[str, Any]]]
) -> Markup:
    seen = " (stands in train)" if row.get("seen_in_train") else ""
    entries = [joined(tag("dt", "Reference"), _text(row.get("reference"), "dd"))]
    for name, rows in predictions.items():
        prediction = rows[row["index"]]
        cut = tag("em", " [cut: too many tokens]") if prediction.get("truncated") else None
        label = tag(
            "dt", tag("span", class_="patch", aria_hidden="true"), run.labels[name], class_=colour(run.style(name))
        )
        entries.append(joined(label, _text(prediction["prediction"], "dd", cut)))
    return tag(
        "article",
        tag("h3", f"Dialogue {row.get('id', row['index'])}{seen}"),
        tag("div", dialogue, tag("dl", *entries), class_="dialogue-and-summaries"),
    )


def _shortened(dialogue: str) -> Markup:
    more = tag("em", " … [cut here]") if len(dialogue) > _MAX_DIALOGUE else None
    return tag("blockquote", dialogue[:_MAX_DIALOGUE], more, dir="auto")


def _text(text: Any, name: str, more: Markup | None = None) -> Markup:
    text = str(text or "").strip()
    cut = "…" if len(text) > _MAX_SUMMARY else ""
    return tag(name, text[:_MAX_SUMMARY] + cut if text else tag("em", "(nothing)"), more, dir="auto")
