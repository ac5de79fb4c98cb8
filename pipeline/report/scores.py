"""rouge.json, checked field by field as far as a report reads it: the file may be of another version, or edited."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

_KINDS = {
    "dialogues": "dialogues",
    "text": "running text",
    "classification": "rows that were classified",
    "regression": "rows that were scored",
}


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Figure(_Read):
    value: float
    low: float | None = None
    high: float | None = None


class _Subset(_Read):
    num_examples: int
    rouge1: _Figure | None = None
    rouge2: _Figure | None = None
    rougeL: _Figure | None = None
    rouge1_ratio: _Figure | None = None
    loss_nats_per_token: _Figure | None = None
    loss_gap_nats_per_token: _Figure | None = None
    perplexity: _Figure | None = None
    accuracy: _Figure | None = None
    f1: _Figure | None = None
    mcc: _Figure | None = None
    accuracy_difference: _Figure | None = None
    loss_nats_per_row: _Figure | None = None
    loss_gap_nats_per_row: _Figure | None = None
    pearson: _Figure | None = None
    spearman: _Figure | None = None
    mean_squared_error: _Figure | None = None
    pearson_difference: _Figure | None = None
    mean_squared_error_gap: _Figure | None = None


class _Variant(_Read):
    label: str
    all: _Subset
    unseen: _Subset | None = None
    kl_mean_nats: float | None = None


class _Generation(_Read):
    num_beams: int
    max_new_tokens: int


class _Intervals(_Read):
    samples: int


class _Settings(_Read):
    generation: _Generation | None = None
    intervals: _Intervals
    precision: str
    f1_class: str | None = None
    """The class that F1 is of; None: the mean over the classes."""


class _File(_Read):
    kind: Literal["dialogues", "text", "classification", "regression"] = "dialogues"
    settings: _Settings
    num_examples: int
    num_examples_seen_in_train: int = 0
    num_references_that_rouge_cannot_score: int = 0
    label_counts: dict[str, int] = {}
    """How many test rows each class has."""
    score_mean: float | None = None
    score_variance: float | None = None
    """Of the test rows' scores."""
    softmax_reference: str | None = None
    variants: dict[str, _Variant]

    @model_validator(mode="after")
    def _has_what_its_kind_has(self) -> _File:
        """Of running text nothing is needed: what was not measured has a – in the table."""
        subsets = [subset for one in self.variants.values() for subset in (one.all, one.unseen) if subset is not None]
        if self.kind == "dialogues":
            complete = all(None not in (subset.rouge1, subset.rouge2, subset.rougeL) for subset in subsets)
            if not complete or self.settings.generation is None:
                raise ValueError("a figure of ROUGE, or how summaries were generated, is missing")
        if self.kind == "classification":
            complete = all(None not in (one.accuracy, one.f1, one.mcc, one.loss_nats_per_row) for one in subsets)
            if not complete or not sum(self.label_counts.values()) or self.num_examples < 1:
                raise ValueError("accuracy, F1, MCC, a loss, or how many rows each label has, is missing")
        if self.kind == "regression":
            complete = all(None not in (one.pearson, one.spearman, one.mean_squared_error) for one in subsets)
            if not complete or None in (self.score_mean, self.score_variance):
                raise ValueError("a correlation, the squared error, or the mean of the rows' scores, is missing")
        return self


@dataclass(frozen=True)
class Scores:
    """What rouge.json holds."""

    file: _File
    figures: dict[str, Any]
    """Its variants, as score_table.py takes them."""

    @property
    def reference(self) -> str | None:
        """The variant that the others are measured against, where it is among them."""
        return self.file.softmax_reference if self.file.softmax_reference in self.file.variants else None


class Refused(str):
    """Why the operating system does not hand the file out: making it anew is no cure."""


def read_scores(file: Path, kind: str | None = None) -> Scores | str:
    """The scores, or why there are none: no such file, or its first fault.

    Args:
        kind: the run's `data.kind`, where it is known: a file of another kind was made before the config was changed.
    """
    try:
        read = _File.model_validate(json.loads(file.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return "there is no rouge.json yet"
    except OSError as error:
        return Refused(f"rouge.json cannot be read ({error.strerror})")
    except RecursionError:
        return "rouge.json cannot be read (brackets in brackets without end)"
    except ValidationError as error:
        first = error.errors()[0]
        return f"rouge.json cannot be read ({'.'.join(map(str, first['loc']))}: {first['msg']})"
    except ValueError as error:
        return f"rouge.json cannot be read ({error})"
    if kind is not None and read.kind != kind:
        return f"rouge.json is of {_KINDS[read.kind]}, and data.kind is {kind}"
    figures = {name: variant.model_dump() for name, variant in read.variants.items()}
    return Scores(read, figures)
