"""A handful of test dialogues with the reference and what every variant made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import notes, prose, section
from .markup import Markup, joined, tag
from .run_files import RunFiles, read_examples, read_predictions
from .samples import answer, choose, conversion, example_of, quoted

NUM_DIALOGUES = 5


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
    dialogues = read_examples(run.whole("prepare"))
    return section(
        "summaries",
        "Summaries",
        *unreadable,
        *(_article(run, row, _dialogue(dialogues, row), predictions) for row in chosen),
        notes([_how_chosen(chosen, len(common))]),
    )


def _how_chosen(chosen: Sequence[dict[str, Any]], num_rows: int) -> str:
    num_seen = sum(bool(row.get("seen_in_train")) for row in chosen)
    which = f"; {num_seen} of them stand in train" if num_seen else ", none of which stands in train"
    return f"{len(chosen)} of {num_rows:,} test dialogues, evenly spaced whatever came out{which}."


def _dialogue(dialogues: Sequence[Mapping[str, Any]] | str, row: Mapping[str, Any]) -> Markup:
    example = example_of(dialogues, row, "dialogue", {"summary": "reference"})
    return example if isinstance(example, Markup) else quoted(example["dialogue"])


def _article(
    run: RunFiles, row: Mapping[str, Any], dialogue: Markup, predictions: Mapping[str, Mapping[int, dict[str, Any]]]
) -> Markup:
    seen = " (stands in train)" if row.get("seen_in_train") else ""
    entries = [joined(tag("dt", "Reference"), answer(row.get("reference")))]
    for name, rows in predictions.items():
        prediction = rows[row["index"]]
        cut = tag("em", " [cut: too many tokens]") if prediction.get("truncated") else None
        entries.append(joined(conversion(run, name), answer(prediction["prediction"], cut)))
    return tag(
        "article",
        tag("h3", f"Dialogue {row.get('id', row['index'])}{seen}"),
        tag("div", dialogue, tag("dl", *entries), class_="dialogue-and-summaries"),
    )
