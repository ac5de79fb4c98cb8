"""From what was measured of all variants to the figures of rouge.json; score_table.py shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from . import bootstrap, rouge
from .bootstrap import POINTS


class Measured(Protocol):
    """Everything measured about one variant, over the N test examples in their order."""

    def entry(self) -> dict[str, Any]:
        """What rouge.json says of the variant beside its figures, its `label` first."""
        ...

    def figures(self, against: Any, keep_N: Tensor, weights_SN: Tensor) -> dict[str, Any]:
        """The figures over the examples that are kept.

        Args:
            against: the variant of the same kind that ratios and gaps are measured against, or None.
            keep_N: bool.
            weights_SN: how often each of the kept examples is in each resample (`draw_bootstrap_weights`).
        """
        ...


@dataclass(frozen=True)
class VariantScores:
    """Of a variant that writes or reads text: its summaries' ROUGE, and its loss."""

    label: str
    rouge: rouge.RougeScores | None
    """None where there was nothing to generate."""
    loss_N: Tensor | None
    """Summed loss of each reference summary, nats. None where perplexity was not asked for."""
    num_tokens_N: Tensor | None
    """Tokens of each reference summary, end token included."""
    generation: dict[str, float | int]
    facts: dict[str, Any] = field(default_factory=dict)
    """What the variant is: attention, feature map, mean KL …"""

    def entry(self) -> dict[str, Any]:
        return {"label": self.label, **self.facts, "generation": self.generation}

    def figures(self, against: VariantScores | None, keep_N: Tensor, weights_SN: Tensor) -> dict[str, Any]:
        figures: dict[str, Any] = {"num_examples": int(keep_N.sum())}
        if self.rouge is not None:
            for name in rouge.ROUGE_TYPES:
                figures[name] = {
                    **bootstrap.mean(self.rouge.f1_N[name][keep_N], weights_SN).as_dict(POINTS),
                    "precision": float(self.rouge.precision_N[name][keep_N].mean()) * POINTS,
                    "recall": float(self.rouge.recall_N[name][keep_N].mean()) * POINTS,
                }
        if self.rouge is not None and against is not None and against.rouge is not None:
            ratio = bootstrap.ratio_of_means(
                self.rouge.f1_N["rouge1"][keep_N], against.rouge.f1_N["rouge1"][keep_N], weights_SN
            )
            figures["rouge1_ratio"] = None if ratio is None else ratio.as_dict()
        if self.loss_N is not None and self.num_tokens_N is not None:
            loss_N, num_tokens_N = self.loss_N[keep_N], self.num_tokens_N[keep_N]
            loss = bootstrap.weighted_mean(loss_N, num_tokens_N, weights_SN)
            figures["num_reference_tokens"] = int(num_tokens_N.sum())
            figures["loss_nats_per_token"] = loss.as_dict()
            figures["perplexity"] = {
                key: None if value is None else _exp(value) for key, value in loss.as_dict().items()
            }
            if against is not None and against.loss_N is not None:
                gap = bootstrap.difference_of_weighted_means(loss_N, against.loss_N[keep_N], num_tokens_N, weights_SN)
                figures["loss_gap_nats_per_token"] = gap.as_dict()
        return figures


def summarize_scores(
    variants: Mapping[str, Measured],
    *,
    seen_in_train_N: Tensor,
    reference: str | None,
    bootstrap_samples: int,
    generators: Mapping[str, torch.Generator],
) -> dict[str, Any]:
    """The figures of rouge.json: per variant over `all` examples and over those `unseen` in train.

    Args:
        seen_in_train_N: bool, which test examples stand word for word in train.
        reference: the variant that ratios and gaps are measured against, or None.
        generators: one for each of "all" and "unseen".
    """
    subsets = {"all": torch.ones_like(seen_in_train_N), "unseen": ~seen_in_train_N}
    figures: dict[str, Any] = {name: scores.entry() for name, scores in variants.items()}
    for subset, keep_N in subsets.items():
        num_examples = int(keep_N.sum())
        if num_examples == 0:
            for name in variants:
                figures[name][subset] = None
            continue
        weights_SN = bootstrap.draw_bootstrap_weights(num_examples, bootstrap_samples, generators[subset])
        for name, scores in variants.items():
            against = variants[reference] if reference is not None and reference != name else None
            figures[name][subset] = scores.figures(against, keep_N, weights_SN)
    return figures


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
