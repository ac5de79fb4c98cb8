"""Some test rows that the main conversion took for another class, or whose score it missed most, and what the softmax
baseline said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..run_folder import MAIN
from .blocks import count, notes, prose, section
from .markup import Markup, joined, tag
from .run_files import RunFiles, read_examples, read_predictions
from .samples import answer, choose, conversion, example_of, quoted
from .scale import is_drawable
from .scores import Scores

NUM_ROWS = 8


def mistakes(run: RunFiles, scores: Scores | str) -> Markup:
    """The section; where nothing was classified yet, what does it."""
    found = _rows(run, MAIN)
    if isinstance(found, str):
        return section("mistakes", "Mistakes", prose(f"{found}.", "warning"))
    if not found:
        none = prose(f"None yet: evaluate has written no predictions.{run.what_makes('them')}")
        return section("mistakes", "Mistakes", none)
    if run.kind == "regression":
        return _furthest(run, scores, found)
    label = run.labels[MAIN]
    wrong = [row for _, row in sorted(found.items()) if row["prediction"] != row["label"]]
    if not wrong:
        return section("mistakes", "Mistakes", tag("p", f"{label} got {_of_rows(len(found))} right."))
    beside, unreadable = _with_baseline(run, scores, found)
    chosen = choose(wrong, NUM_ROWS)
    examples = read_examples(run.whole("prepare"))
    said = [
        f"{len(chosen)} of the {len(wrong):,} that it got wrong, of {len(found):,} rows; evenly spaced, those that "
        "stand in train last."
    ]
    for other in [other for other in beside if other != MAIN]:
        both = [row for row in wrong if row["index"] in beside[other]]
        num_right = sum(beside[other][row["index"]]["prediction"] == row["label"] for row in both)
        said.append(f"Of these {len(both):,} {run.labels[other]} got {num_right:,} right.".replace("`", "'"))
    return section(
        "mistakes",
        "Mistakes",
        tag("p", f"Rows that {label} took for another class."),
        unreadable,
        *(_article(run, row, _texts(examples, row), beside) for row in chosen),
        notes(said),
    )


def _furthest(run: RunFiles, scores: Scores | str, found: Mapping[int, dict[str, Any]]) -> Markup:
    """Of rows with scores: those that were missed by most."""
    beside, unreadable = _with_baseline(run, scores, found)
    ordered = sorted(found.values(), key=lambda row: (-abs(row["prediction"] - row["label"]), row["index"]))
    chosen = ordered[:NUM_ROWS]
    examples = read_examples(run.whole("prepare"))
    said = f"The {len(chosen)} of {count(len(found), 'row')} whose score {run.labels[MAIN]} missed by most."
    return section(
        "mistakes",
        "Mistakes",
        tag("p", said),
        unreadable,
        *(_article(run, row, _texts(examples, row), beside) for row in chosen),
    )


def _with_baseline(
    run: RunFiles, scores: Scores | str, found: Mapping[int, dict[str, Any]]
) -> tuple[dict[str, Mapping[int, dict[str, Any]]], Markup | None]:
    """The main conversion's rows and the softmax baseline's, by name, as far as there are any; why these cannot be
    read."""
    name = scores.reference if isinstance(scores, Scores) and scores.reference in run.labels else None
    baseline = _rows(run, name) if name not in (None, MAIN) else {}
    unreadable = prose(f"{baseline}.", "warning") if isinstance(baseline, str) else None
    return {MAIN: found} | (
        {} if isinstance(baseline, str) or name is None or not baseline else {name: baseline}
    ), unreadable


def _of_rows(num: int) -> str:
    return "the one test row" if num == 1 else f"all {count(num, 'test row')}"


def _rows(run: RunFiles, name: str | None) -> dict[int, dict[str, Any]] | str:
    """What a conversion took each row for, by its index, where the row says both that and its label."""
    if name is None:
        return {}
    rows = read_predictions(run.folder.stage("evaluate"), name)
    if isinstance(rows, str):
        return rows
    if run.kind == "regression":
        return {n: row for n, row in rows.items() if all(is_drawable(row.get(key)) for key in ("label", "prediction"))}
    return {index: row for index, row in rows.items() if isinstance(row.get("label"), str)}


def _texts(examples: Sequence[Mapping[str, Any]] | str, row: Mapping[str, Any]) -> Markup:
    example = example_of(examples, row, "text", {"label": "label"})
    if isinstance(example, Markup):
        return example
    second = example.get("second_text")
    if not isinstance(second, str):
        return quoted(example["text"])
    return tag("div", quoted(example["text"]), quoted(second), style="display: grid; gap: .6rem; align-content: start")


def _told(label: Any) -> Markup:
    return answer(label if isinstance(label, str) else f"{label:.4g}")


def _article(
    run: RunFiles, row: Mapping[str, Any], texts: Markup, predictions: Mapping[str, Mapping[int, dict[str, Any]]]
) -> Markup:
    seen = " (stands in train)" if row.get("seen_in_train") else ""
    is_score = run.kind == "regression"
    entries = [joined(tag("dt", "Score" if is_score else "Label"), _told(row["label"]))]
    for name, rows in predictions.items():
        if row["index"] in rows:
            entries.append(joined(conversion(run, name), _told(rows[row["index"]]["prediction"])))
    return tag(
        "article",
        tag("h3", f"Row {row.get('id', row['index'])}{seen}"),
        tag("div", texts, tag("dl", *entries), class_="dialogue-and-summaries"),
    )
