"""rouge.json, checked field by field as far as a report reads it: the file may be of another version, or edited."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


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


class _File(_Read):
    kind: str = "dialogues"
    settings: _Settings
    num_examples: int
    num_examples_seen_in_train: int = 0
    num_references_that_rouge_cannot_score: int = 0
    softmax_reference: str | None = None
    variants: dict[str, _Variant]

    @model_validator(mode="after")
    def _dialogues_have_rouge(self) -> _File:
        """Only of running text is nothing generated."""
        subsets = [subset for one in self.variants.values() for subset in (one.all, one.unseen) if subset is not None]
        complete = all(None not in (subset.rouge1, subset.rouge2, subset.rougeL) for subset in subsets)
        if self.kind != "text" and not (complete and self.settings.generation is not None):
            raise ValueError("a figure of ROUGE, or how summaries were generated, is missing")
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


def read_scores(file: Path) -> Scores | str:
    """The scores, or why there are none: no such file, or its first fault."""
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
    figures = {name: variant.model_dump() for name, variant in read.variants.items()}
    return Scores(read, figures)
