"""ROUGE of generated summaries, and bootstrap intervals of any mean over examples.

The scores are rouge-score's (Google's reimplementation of ROUGE-1.5.5) with Porter stemming. Its tokenizer keeps
`[a-z0-9]` only, so text in other scripts has no tokens and scores 0; that is ROUGE as the papers report it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

UNSCORABLE = "have neither a letter a-z nor a digit, all that ROUGE looks at: they score 0 whatever is predicted"

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

SENTENCE_RULE = (
    "a sentence ends at a line break, or after one or more of . ! ? … with any closing quotes or brackets, "
    "where white space follows"
)
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\s*\n\s*")

INTERVAL_LEVEL = 0.95


def split_sentences(text: str) -> list[str]:
    """Sentences of `text` by `SENTENCE_RULE` (rougeLsum compares sentence by sentence); empty ones are left out.

    Abbreviations ("Mr. Smith") are split too. Prediction and reference follow the same rule, so that costs both alike.
    """
    sentences, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        closing = len(end.group().rstrip())
        sentences.append(text[start : end.start() + closing])
        start = end.end()
    sentences.append(text[start:])
    return [sentence.strip() for sentence in sentences if sentence.strip()]


def num_unscorable(references: Iterable[str]) -> int:
    """How many references leave rouge-score no token: `[a-z0-9]` is all it keeps, and they score 0 in any case."""
    return sum(not re.search("[a-z0-9]", reference.lower()) for reference in references)


@dataclass(frozen=True)
class RougeScores:
    """Per example and ROUGE type: precision, recall and F1, as fractions, float64 (N,)."""

    precision_N: dict[str, Tensor]
    recall_N: dict[str, Tensor]
    f1_N: dict[str, Tensor]


def score_rouge(predictions: Sequence[str], references: Sequence[str]) -> RougeScores:
    """ROUGE-1, -2, -L and -Lsum of every prediction against its reference, stemmed.

    An empty prediction (or reference) scores 0. Raises ValueError when the two lists differ in length.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(list(ROUGE_TYPES), use_stemmer=True)
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ROUGE_TYPES}
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score("\n".join(split_sentences(reference)), "\n".join(split_sentences(prediction)))
        for name in ROUGE_TYPES:
            score = scores[name]
            rows[name].append((score.precision, score.recall, score.fmeasure))
    tables = {name: torch.tensor(rows[name], dtype=torch.float64).reshape(-1, 3) for name in ROUGE_TYPES}
    return RougeScores(
        precision_N={name: table[:, 0] for name, table in tables.items()},
        recall_N={name: table[:, 1] for name, table in tables.items()},
        f1_N={name: table[:, 2] for name, table in tables.items()},
    )


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % percentile-bootstrap interval (None where nothing was resampled)."""

    value: float
    low: float | None = None
    high: float | None = None

    def as_dict(self, scale: float = 1.0) -> dict[str, float | None]:
        """`{value, low, high}`, each multiplied by `scale` (100 turns fractions into ROUGE points)."""
        return {
            "value": self.value * scale,
            "low": None if self.low is None else self.low * scale,
            "high": None if self.high is None else self.high * scale,
        }

    @property
    def half_width(self) -> float | None:
        """Half the interval's width: the ± of a table."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def draw_bootstrap_weights(num_examples: int, num_samples: int, generator: torch.Generator) -> Tensor:
    """How often each of N examples was drawn in each of S resamples of size N: float64 (S, N), each row sums to N.

    One matrix serves every score and variant of an evaluation, which makes differences and ratios *paired*.
    """
    weights_SN = torch.zeros(num_samples, num_examples, dtype=torch.float64)
    for row_N in weights_SN:
        drawn = torch.randint(num_examples, (num_examples,), generator=generator)
        row_N += torch.bincount(drawn, minlength=num_examples)
    return weights_SN


def _interval(value: float, samples_S: Tensor) -> Interval:
    if samples_S.numel() == 0 or not bool(torch.isfinite(samples_S).all()):
        return Interval(value)
    tail = (1 - INTERVAL_LEVEL) / 2
    low, high = torch.quantile(samples_S, torch.tensor([tail, 1 - tail], dtype=samples_S.dtype)).tolist()
    return Interval(value, low, high)


def weighted_mean(values_N: Tensor, sizes_N: Tensor, weights_SN: Tensor) -> Interval:
    """Σ values / Σ sizes: the mean per token when values are an example's summed loss and sizes its tokens."""
    values_N, sizes_N = values_N.double(), sizes_N.double()
    return _interval(float(values_N.sum() / sizes_N.sum()), (weights_SN @ values_N) / (weights_SN @ sizes_N))


def mean(values_N: Tensor, weights_SN: Tensor) -> Interval:
    """Mean over examples, with its bootstrap interval."""
    return weighted_mean(values_N, torch.ones_like(values_N), weights_SN)


def ratio_of_means(values_N: Tensor, reference_N: Tensor, weights_SN: Tensor) -> Interval | None:
    """mean(values) / mean(reference) with a paired interval; None where the reference's mean is 0."""
    values_N, reference_N = values_N.double(), reference_N.double()
    if float(reference_N.sum()) == 0:
        return None
    value = float(values_N.sum() / reference_N.sum())
    return _interval(value, (weights_SN @ values_N) / (weights_SN @ reference_N))


def difference_of_weighted_means(
    values_N: Tensor, reference_N: Tensor, sizes_N: Tensor, weights_SN: Tensor
) -> Interval:
    """Σ (values - reference) / Σ sizes with a paired interval: the gap in loss per token between two models."""
    return weighted_mean(values_N.double() - reference_N.double(), sizes_N, weights_SN)
