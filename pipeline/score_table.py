"""The figures of rouge.json for people: table on the terminal, results.md, a sentence a variant. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .formatting import format_bytes

_PLAIN_BELOW = 1e7
"""From here on a cell has four significant digits and an exponent: a perplexity may have hundreds of digits."""

TABLE_COLUMNS = (
    "variant",
    "ROUGE-1",
    "ROUGE-2",
    "ROUGE-L",
    "loss",
    "perplexity",
    "mean KL",
    "train min",
    "peak memory",
)
_ROUGE_COLUMNS = slice(1, 4)
NARROW_COLUMNS = ("variant", "ROUGE-1", "R-2", "R-L", "loss", "ppl", "KL", "min", "memory")
"""The same for 80 columns, where a row of four figures before the point still takes one line."""


def table_columns(figures: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Titles of the columns, and those for 80 columns; without ROUGE's where nothing was generated.

    Args:
        figures: what `summarize_scores` gave.
    """
    if _has_rouge(figures):
        return TABLE_COLUMNS, NARROW_COLUMNS
    wide, narrow = list(TABLE_COLUMNS), list(NARROW_COLUMNS)
    del wide[_ROUGE_COLUMNS], narrow[_ROUGE_COLUMNS]
    return tuple(wide), tuple(narrow)


def _has_rouge(figures: Mapping[str, Any]) -> bool:
    return any(variant["all"].get("rouge1") is not None for variant in figures.values())


def table_rows(figures: Mapping[str, Any], training: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Cells under `table_columns`, one row a variant; – where there is no figure.

    Args:
        figures: what `summarize_scores` gave.
        training: per variant `minutes` (or None) and `peak_memory_bytes` (or None) of its training stages.
    """
    rows = []
    for name, variant in figures.items():
        scores = variant["all"]
        minutes, memory = training[name]["minutes"], training[name]["peak_memory_bytes"]
        rouge = []
        if _has_rouge(figures):
            rouge = [
                _with_half_width(scores["rouge1"]),
                f"{scores['rouge2']['value']:.2f}",
                f"{scores['rougeL']['value']:.2f}",
            ]
        rows.append(
            [
                variant["label"],
                *rouge,
                _number(scores.get("loss_nats_per_token"), ".4f"),
                _number(scores.get("perplexity"), ".2f"),
                "–" if variant.get("kl_mean_nats") is None else _short(variant["kl_mean_nats"], ".4f"),
                "–" if minutes is None else f"{minutes:.1f}",
                "–" if memory is None else format_bytes(memory),
            ]
        )
    return rows


def _with_half_width(figure: Mapping[str, float | None]) -> str:
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['value']:.2f}"
    return f"{figure['value']:.2f} ± {(figure['high'] - figure['low']) / 2:.2f}"


def _number(figure: Mapping[str, float] | None, form: str) -> str:
    return "–" if figure is None else _short(figure["value"], form)


def _short(value: float, form: str) -> str:
    return f"{value:{form if abs(value) < _PLAIN_BELOW else '.3e'}}"


def comparison_lines(figures: Mapping[str, Any], reference: str | None) -> list[str]:
    """One sentence for every variant: its ROUGE-1, if any, over the softmax baseline's, and its gap in loss."""
    if reference is None:
        return []
    lines = []
    against = figures[reference]["label"]
    for name, variant in figures.items():
        scores = variant["all"] or {}
        ratio, gap = scores.get("rouge1_ratio"), scores.get("loss_gap_nats_per_token")
        if name == reference or (ratio is None and (gap is None or _has_rouge(figures))):
            continue
        parts = []
        if ratio is not None:
            interval = "" if ratio["low"] is None else f" (95 % interval {ratio['low']:.1%} to {ratio['high']:.1%})"
            parts.append(f"ROUGE-1 is {ratio['value']:.1%} of {against}'s{interval}")
        if gap is not None:
            interval = "" if gap["low"] is None else f" ({gap['low']:+.4f} to {gap['high']:+.4f})"
            parts.append(f"loss {gap['value']:+.4f} nats a token{interval}")
            if ratio is None:
                parts[-1] += f" against {against}"
        lines.append(f"{variant['label']}: {', '.join(parts)}")
    return lines


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
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    blocks = [f"# {title}", "\n".join([header, rule, *body])]
    if comparisons:
        blocks.append("\n".join(f"- {line}" for line in comparisons))
    blocks.append("\n".join(notes))
    return "\n\n".join(blocks) + "\n"
