"""The figures of rouge.json for people: table on the terminal, results.md, a sentence a variant. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .formatting import format_bytes

_PLAIN_BELOW = 1e7
"""From here on a cell has four significant digits and an exponent: a perplexity may have hundreds of digits."""

_Figures = Mapping[str, Any]

_ROUGE = (("ROUGE-1", "ROUGE-1"), ("ROUGE-2", "R-2"), ("ROUGE-L", "R-L"))
_CLASSES = (("accuracy", "accuracy"), ("F1", "F1"), ("MCC", "MCC"))
_SCORES = (("Pearson", "Pearson"), ("Spearman", "Spearman"), ("sq. error", "sq. error"))
_LOSS = ("loss", "loss")
_PERPLEXITY = ("perplexity", "ppl")
_TRAINING = (("mean KL", "KL"), ("train min", "min"), ("peak memory", "memory"))
"""Titles of columns, and those for 80 columns, where a row of four figures before the point still takes one line."""


def table_columns(figures: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Titles of the columns, and those for 80 columns: of what was measured.

    Args:
        figures: what `summarize_scores` gave.
    """
    if has_classes(figures):
        titles = [("variant", "variant"), *_CLASSES, _LOSS, *_TRAINING]
    elif has_correlations(figures):
        titles = [("variant", "variant"), *_SCORES, *_TRAINING]
    else:
        titles = [("variant", "variant"), *(_ROUGE if has_rouge(figures) else ()), _LOSS, _PERPLEXITY, *_TRAINING]
    return tuple(wide for wide, _ in titles), tuple(narrow for _, narrow in titles)


def has_rouge(figures: Mapping[str, Any]) -> bool:
    """Whether summaries were generated."""
    return any(variant["all"].get("rouge1") is not None for variant in figures.values())


def has_classes(figures: Mapping[str, Any]) -> bool:
    """Whether rows were classified."""
    return any(variant["all"].get("accuracy") is not None for variant in figures.values())


def has_correlations(figures: Mapping[str, Any]) -> bool:
    """Whether rows were scored."""
    return any(variant["all"].get("pearson") is not None for variant in figures.values())


def table_rows(figures: Mapping[str, Any], training: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Cells under `table_columns`, one row a variant; – where there is no figure.

    Args:
        figures: what `summarize_scores` gave.
        training: per variant `minutes` (or None) and `peak_memory_bytes` (or None) of its training stages.
    """
    cells = _with_rouge if has_rouge(figures) else _of_losses
    if has_classes(figures) or has_correlations(figures):
        cells = _of_classes if has_classes(figures) else _of_correlations
    rows = []
    for name, variant in figures.items():
        minutes, memory = training[name]["minutes"], training[name]["peak_memory_bytes"]
        rows.append(
            [
                variant["label"],
                *cells(variant["all"]),
                "–" if variant.get("kl_mean_nats") is None else _short(variant["kl_mean_nats"], ".4f"),
                "–" if minutes is None else f"{minutes:.1f}",
                "–" if memory is None else format_bytes(memory),
            ]
        )
    return rows


def _of_classes(scores: _Figures) -> list[str]:
    shares = [f"{scores[key]['value']:.2f}" for key in ("f1", "mcc")]
    return [_with_half_width(scores["accuracy"]), *shares, _number(scores.get("loss_nats_per_row"), ".4f")]


def _of_correlations(scores: _Figures) -> list[str]:
    return [
        _with_half_width(scores["pearson"]),
        _with_half_width(scores["spearman"]),
        _number(scores.get("mean_squared_error"), ".4f"),
    ]


def _with_rouge(scores: _Figures) -> list[str]:
    others = [f"{scores[key]['value']:.2f}" for key in ("rouge2", "rougeL")]
    return [_with_half_width(scores["rouge1"]), *others, *_of_losses(scores)]


def _of_losses(scores: _Figures) -> list[str]:
    return [_number(scores.get("loss_nats_per_token"), ".4f"), _number(scores.get("perplexity"), ".2f")]


def _with_half_width(figure: Mapping[str, float | None]) -> str:
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['value']:.2f}"
    return f"{figure['value']:.2f} ± {(figure['high'] - figure['low']) / 2:.2f}"


def _number(figure: Mapping[str, float] | None, form: str) -> str:
    return "–" if figure is None else _short(figure["value"], form)


def _short(value: float, form: str) -> str:
    return f"{value:{form if abs(value) < _PLAIN_BELOW else '.3e'}}"


def comparison_lines(figures: Mapping[str, Any], reference: str | None) -> list[str]:
    """One sentence for every variant: its accuracy or correlation, or ROUGE-1 if any, beside the softmax baseline's,
    and its gap in loss."""
    if reference is None:
        return []
    compare = _compared_correlations if has_correlations(figures) else _compared_text
    compare = _compared_classes if has_classes(figures) else compare
    lines = []
    against = figures[reference]["label"]
    for name, variant in figures.items():
        parts = [] if name == reference else compare(variant["all"] or {}, against, has_rouge(figures))
        if parts:
            lines.append(f"{variant['label']}: {', '.join(parts)}")
    return lines


def _compared_text(scores: _Figures, against: str, with_rouge: bool) -> list[str]:
    ratio, gap = scores.get("rouge1_ratio"), scores.get("loss_gap_nats_per_token")
    if ratio is None and with_rouge:
        return []
    parts = []
    if ratio is not None:
        interval = "" if ratio["low"] is None else f" (95 % interval {ratio['low']:.1%} to {ratio['high']:.1%})"
        parts.append(f"ROUGE-1 is {ratio['value']:.1%} of {against}'s{interval}")
    if gap is not None:
        parts.append(_gap(gap, "token"))
        if ratio is None:
            parts[-1] += f" against {against}"
    return parts


def _compared_classes(scores: _Figures, against: str, _: bool) -> list[str]:
    difference, gap = scores.get("accuracy_difference"), scores.get("loss_gap_nats_per_row")
    if difference is None:
        return []
    return [_difference("accuracy", difference, against)] + ([] if gap is None else [_gap(gap, "row")])


def _compared_correlations(scores: _Figures, against: str, _: bool) -> list[str]:
    difference, gap = scores.get("pearson_difference"), scores.get("mean_squared_error_gap")
    if difference is None:
        return []
    parts = [_difference("Pearson correlation", difference, against)]
    return parts + ([] if gap is None else [f"squared error {_signed(gap)}"])


def _difference(what: str, difference: Mapping[str, float | None], against: str) -> str:
    value, low, high = (_points(difference[key]) for key in ("value", "low", "high"))
    interval = f" ({low} to {high})" if low and high else ""
    return f"{what} is {value} points{interval} against {against}"


def _gap(gap: Mapping[str, float | None], unit: str) -> str:
    return f"loss {_signed(gap, f' nats a {unit}')}"


def _signed(gap: Mapping[str, float | None], unit: str = "") -> str:
    interval = "" if gap["low"] is None else f" ({gap['low']:+.4f} to {gap['high']:+.4f})"
    return f"{gap['value']:+.4f}{unit}{interval}"


def _points(value: float | None) -> str:
    """`+0.3`; no sign before what is rounded to nothing."""
    return "" if value is None else "0.0" if abs(value) < 0.05 else f"{value:+.1f}"


def markdown_report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    comparisons: Sequence[str],
    notes: Sequence[str],
) -> str:
    """results.md: the table, how each variant compares with the baseline, and how it was measured."""
    header = "| " + " | ".join(columns) + " |"
    rule = "|" + "|".join(":--" if index == 0 else "--:" for index in range(len(columns))) + "|"
    body = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    blocks = [f"# {title}", "\n".join([header, rule, *body])]
    if comparisons:
        blocks.append("\n".join(f"- {line}" for line in comparisons))
    blocks.append("\n".join(notes))
    return "\n\n".join(blocks) + "\n"
