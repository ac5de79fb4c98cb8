"""From predictions and losses of all variants to rouge.json, the table on the terminal and results.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import rouge
from .metrics import format_bytes

POINTS = 100
"""ROUGE is reported in points, as papers do: F1 x 100."""

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
NARROW_COLUMNS = ("variant", "ROUGE-1", "R-2", "R-L", "loss", "ppl", "KL", "min", "memory")
"""The same for 80 columns, where a row of four figures before the point still takes one line."""


@dataclass(frozen=True)
class VariantScores:
    """Everything measured about one variant, over the N test examples in their order."""

    label: str
    rouge: rouge.RougeScores
    loss_N: Tensor | None
    """Summed loss of each reference summary, nats. None where perplexity was not asked for."""
    num_tokens_N: Tensor | None
    """Tokens of each reference summary, end token included."""
    generation: dict[str, float | int]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the variant is: attention, feature map, mean KL …"""


def summarize_scores(
    variants: Mapping[str, VariantScores],
    *,
    seen_in_train_N: Tensor,
    reference: str | None,
    bootstrap_samples: int,
    generators: Mapping[str, torch.Generator],
) -> dict[str, Any]:
    """The figures of rouge.json: per variant over `all` examples and over those `unseen` in train.

    Args:
        seen_in_train_N: bool, which test examples stand word for word in train.
        reference: the variant that ROUGE-1 ratios and loss gaps are measured against, or None.
        generators: one for each of "all" and "unseen".
    """
    subsets = {"all": torch.ones_like(seen_in_train_N), "unseen": ~seen_in_train_N}
    figures: dict[str, Any] = {
        name: {"label": scores.label, **scores.facts, "generation": scores.generation}
        for name, scores in variants.items()
    }
    for subset, keep_N in subsets.items():
        num_examples = int(keep_N.sum())
        if num_examples == 0:
            for name in variants:
                figures[name][subset] = None
            continue
        weights_SN = rouge.draw_bootstrap_weights(num_examples, bootstrap_samples, generators[subset])
        for name, scores in variants.items():
            against = variants[reference] if reference is not None and reference != name else None
            figures[name][subset] = _subset_figures(scores, against, keep_N, weights_SN)
    return figures


def _subset_figures(
    scores: VariantScores, against: VariantScores | None, keep_N: Tensor, weights_SN: Tensor
) -> dict[str, Any]:
    figures: dict[str, Any] = {"num_examples": int(keep_N.sum())}
    for name in rouge.ROUGE_TYPES:
        figures[name] = {
            **rouge.mean(scores.rouge.f1_N[name][keep_N], weights_SN).as_dict(POINTS),
            "precision": float(scores.rouge.precision_N[name][keep_N].mean()) * POINTS,
            "recall": float(scores.rouge.recall_N[name][keep_N].mean()) * POINTS,
        }
    if against is not None:
        ratio = rouge.ratio_of_means(
            scores.rouge.f1_N["rouge1"][keep_N], against.rouge.f1_N["rouge1"][keep_N], weights_SN
        )
        figures["rouge1_ratio"] = None if ratio is None else ratio.as_dict()
    if scores.loss_N is not None and scores.num_tokens_N is not None:
        loss_N, num_tokens_N = scores.loss_N[keep_N], scores.num_tokens_N[keep_N]
        loss = rouge.weighted_mean(loss_N, num_tokens_N, weights_SN)
        figures["num_reference_tokens"] = int(num_tokens_N.sum())
        figures["loss_nats_per_token"] = loss.as_dict()
        figures["perplexity"] = {key: None if value is None else _exp(value) for key, value in loss.as_dict().items()}
        if against is not None and against.loss_N is not None:
            gap = rouge.difference_of_weighted_means(loss_N, against.loss_N[keep_N], num_tokens_N, weights_SN)
            figures["loss_gap_nats_per_token"] = gap.as_dict()
    return figures


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def table_rows(figures: Mapping[str, Any], training: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Cells under `TABLE_COLUMNS`, one row a variant; – where there is no figure.

    Args:
        figures: what `summarize_scores` gave.
        training: per variant `minutes` (or None) and `peak_memory_bytes` (or None) of its training stages.
    """
    rows = []
    for name, variant in figures.items():
        scores = variant["all"]
        minutes, memory = training[name]["minutes"], training[name]["peak_memory_bytes"]
        rows.append(
            [
                variant["label"],
                _with_half_width(scores["rouge1"]),
                f"{scores['rouge2']['value']:.2f}",
                f"{scores['rougeL']['value']:.2f}",
                _number(scores.get("loss_nats_per_token"), ".4f"),
                _number(scores.get("perplexity"), ".2f"),
                "–" if variant.get("kl_mean_nats") is None else f"{variant['kl_mean_nats']:.4f}",
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
    return "–" if figure is None else f"{figure['value']:{form}}"


def comparison_lines(figures: Mapping[str, Any], reference: str | None) -> list[str]:
    """One sentence for every variant: its ROUGE-1 over the softmax baseline's, and its gap in loss."""
    if reference is None:
        return []
    lines = []
    against = figures[reference]["label"]
    for name, variant in figures.items():
        ratio = (variant["all"] or {}).get("rouge1_ratio")
        if name == reference or ratio is None:
            continue
        line = f"{variant['label']}: ROUGE-1 is {ratio['value']:.1%} of {against}'s"
        if ratio["low"] is not None:
            line += f" (95 % interval {ratio['low']:.1%} to {ratio['high']:.1%})"
        gap = variant["all"].get("loss_gap_nats_per_token")
        if gap is not None:
            line += f", loss {gap['value']:+.4f} nats a token"
            if gap["low"] is not None:
                line += f" ({gap['low']:+.4f} to {gap['high']:+.4f})"
        lines.append(line)
    return lines


def markdown_report(title: str, rows: Sequence[Sequence[str]], comparisons: Sequence[str], notes: Sequence[str]) -> str:
    """results.md: the table, how each variant compares with the baseline, and how it was measured."""
    header = "| " + " | ".join(TABLE_COLUMNS) + " |"
    rule = "|" + "|".join(":--" if index == 0 else "--:" for index in range(len(TABLE_COLUMNS))) + "|"
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    blocks = [f"# {title}", "\n".join([header, rule, *body])]
    if comparisons:
        blocks.append("\n".join(f"- {line}" for line in comparisons))
    blocks.append("\n".join(notes))
    return "\n\n".join(blocks) + "\n"
