"""The scores: results.md's table, and ROUGE-1 and the loss with their intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..score_table import comparison_lines, table_columns, table_rows
from .blocks import figure, in_line, notes, prose, section, table
from .interval_chart import Estimate, interval_chart
from .markup import Markup, tag
from .run_files import RunFiles
from .scale import is_drawable
from .scores import Refused, Scores
from .staleness import Stale

_CHARTS = (
    ("rouge1", "ROUGE-1 of every variant", "ROUGE-1, points; more is better", 2),
    ("accuracy", "Accuracy of every variant", "accuracy, %; more is better", 2),
    ("pearson", "Pearson correlation of every variant", "Pearson correlation × 100; more is better", 2),
    ("loss_nats_per_token", "Loss of every variant", "loss, nats a token; less is better", 3),
    ("loss_nats_per_row", "Loss of every variant", "loss, nats a row; less is better", 3),
    ("mean_squared_error", "Squared error of every variant", "mean squared error; less is better", 3),
)
"""Figure, title, unit and decimals; what was not measured has none."""
_TRAINING_COLUMNS = (
    "KL, in nats: of the distilled from the softmax attention, after stage one. Train: minutes of distill and "
    "finetune; memory: the peak of one process."
)
_HALF_WIDTH = "± is half of a 95 % bootstrap interval, which the charts show as a line."


def results(run: RunFiles, scores: Scores | str, stale: Stale) -> Markup:
    """The section; where there are no scores, why, and what makes them."""
    if isinstance(scores, str):
        cure = run.what_makes("it") or " `hedgehog evaluate CONFIG --force` makes it anew."
        cure = "" if isinstance(scores, Refused) else cure
        return section("results", "Results", prose(f"No scores: {scores}.{cure}"))
    comparisons = comparison_lines(scores.figures, scores.reference)
    training = _training(run)
    unknown = {"minutes": None, "peak_memory_bytes": None}
    rows = table_rows(scores.figures, {name: (training or {}).get(name, unknown) for name in scores.figures})
    return section(
        "results",
        "Results",
        _outdated(stale),
        prose("What evaluate noted of the training cannot be read.", "warning") if training is None else None,
        table(table_columns(scores.figures)[0], rows, caption="Scores of all variants"),
        tag("ul", *(tag("li", line) for line in comparisons)) if comparisons else None,
        tag("div", *(_chart(run, scores, *chart) for chart in _CHARTS), class_="panels"),
        notes(list(_how_measured(scores))),
    )


def _chart(run: RunFiles, scores: Scores, key: str, title: str, unit: str, decimals: int) -> Markup | None:
    estimates = {
        name: Estimate(variant["label"], _style(run, name), **variant["all"][key])
        for name, variant in scores.figures.items()
        if variant["all"][key] is not None
    }
    reference = estimates.get(scores.reference) if scores.reference is not None else None
    chart = interval_chart(
        f"chart-{key}", list(estimates.values()), title=title, unit=unit, decimals=decimals, reference=reference
    )
    if chart is None:
        return None
    note = [] if reference is None else [f"Dashed: {reference.label}."]
    num_bad = sum(not is_drawable(estimate.value) for estimate in estimates.values())
    note += [f"{num_bad} not finite."] * bool(num_bad)
    return figure(title, chart, note=note)


def _style(run: RunFiles, name: str) -> int:
    return run.style(name) if name in run.labels else len(run.labels)


def _training(run: RunFiles) -> dict[str, dict[str, Any]] | None:
    """What evaluate noted of the training of each variant when it scored them; None where it is something else."""
    evaluate = run.whole("evaluate")
    noted = {} if evaluate is None else evaluate.manifest.summary.get("training", {})
    if not isinstance(noted, dict):
        return None
    found = {}
    for name, entry in noted.items():
        if not isinstance(entry, dict):
            return None
        found[name] = {key: entry.get(key) for key in ("minutes", "peak_memory_bytes")}
        if not all(value is None or is_drawable(value) for value in found[name].values()):
            return None
    return found


def _outdated(stale: Stale) -> Markup | None:
    """What was made anew since evaluate scored it, or since what it scored was made of it."""
    if "evaluate" not in stale.titles:
        return None
    if len(stale.commands) == 1:
        anew = " and ".join(stale.first["evaluate"])
        said = f"{anew} ran anew since. `{stale.commands[0]}` scores them again."
    else:
        said = f"{stale.reasons()}. The top of the page says what to make again, in which order."
    return prose(f"These are scores of earlier weights: {said}", "warning")


def _how_measured(scores: Scores) -> Iterator[str]:
    told = {
        "text": _how_text_was,
        "classification": _how_classes_were,
        "regression": _how_scores_were,
        "dialogues": _how_dialogues_were,
    }
    return told[scores.file.kind](scores)


def _how_text_was(scores: Scores) -> Iterator[str]:
    file = scores.file
    yield f"{file.num_examples} rows of text, each read by itself, {file.settings.precision}."
    if file.settings.intervals.samples:
        yield "The chart's lines are 95 % bootstrap intervals over rows."
    yield f"Loss and perplexity: per token, each row's first one aside. {_TRAINING_COLUMNS}"


def _how_classes_were(scores: Scores) -> Iterator[str]:
    file = scores.file
    seen = file.num_examples_seen_in_train
    yield f"{file.num_examples} test rows, {seen} of which stand word for word in train, {file.settings.precision}."
    yield from _without_seen(scores, "accuracy", "Accuracy")
    name, num_rows = max(file.label_counts.items(), key=lambda entry: entry[1])
    yield f"The most frequent label, {in_line(name)}, is that of {num_rows / file.num_examples:.1%}."
    f1 = "the mean over the classes" if file.settings.f1_class is None else f"that of {in_line(file.settings.f1_class)}"
    yield f"Accuracy, F1 ({f1}) and MCC, Matthews correlation: × 100."
    if file.settings.intervals.samples:
        yield _HALF_WIDTH
    yield f"Loss: nats a row, of its label. {_TRAINING_COLUMNS}"


def _how_scores_were(scores: Scores) -> Iterator[str]:
    file = scores.file
    seen = file.num_examples_seen_in_train
    yield f"{file.num_examples} test rows, {seen} of which stand word for word in train, {file.settings.precision}."
    yield from _without_seen(scores, "pearson", "Pearson correlation")
    yield f"Who always says their mean, {file.score_mean:.4g}, has a squared error of {file.score_variance:.4g}."
    yield "Pearson and Spearman: correlation of the predicted with the rows' scores, × 100."
    if file.settings.intervals.samples:
        yield _HALF_WIDTH
    yield f"Squared error: the mean over the rows. {_TRAINING_COLUMNS}"


def _how_dialogues_were(scores: Scores) -> Iterator[str]:
    file = scores.file
    generation = file.settings.generation
    assert generation is not None, "else scores.py has refused the file"
    search = "greedy" if generation.num_beams == 1 else f"{generation.num_beams} beams"
    yield (
        f"{file.num_examples} test dialogues, {file.num_examples_seen_in_train} of which stand word for word in train; "
        f"{search}, at most {generation.max_new_tokens} new tokens, {file.settings.precision}."
    )
    yield from _without_seen(scores, "rouge1", "ROUGE-1")
    yield "ROUGE: F1 × 100 with stemming."
    if file.settings.intervals.samples:
        yield _HALF_WIDTH
    yield f"Loss and perplexity: per token of the reference summaries. {_TRAINING_COLUMNS}"
    unscorable = file.num_references_that_rouge_cannot_score
    if unscorable:
        yield f"{unscorable} of the references have neither a letter a-z nor a digit, and score 0 in any case."


def _without_seen(scores: Scores, key: str, title: str) -> Iterator[str]:
    without = [
        f"{variant['label']} {variant['unseen'][key]['value']:.2f}"
        for variant in scores.figures.values()
        if variant["unseen"] is not None and variant["unseen"][key] is not None
    ]
    if scores.file.num_examples_seen_in_train and without:
        yield f"{title} without those: {', '.join(without)}."
