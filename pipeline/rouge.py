"""ROUGE of generated summaries.

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
