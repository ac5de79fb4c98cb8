"""Scores of texts, which regression learns: a number a row, as GLUE's STS-B has them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import DataError
from .examples import LabelledExample, Split, missing_field
from .json_rows import Row

OUTPUT_NAMES = ["score"]
"""What the one output of a head is called, where a head of classes has their names."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SECRET = -1.0
"""The hub's score of a row that has none."""
_LARGEST = 1e6
"""Squares of larger scores leave float32 nothing to tell rows apart by."""


def score_of(row: Row, name: str) -> float:
    """A row's score.

    Raises:
        DataError: there is none, or no finite number.
    """
    if name not in row.fields:
        fault = missing_field(row.place, "label_field", name, row.fields)
        raise DataError(f"{fault}, or take a split that has scores")
    value: Any = row.fields[name]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{row.place}: field '{name}' has no score; score the row, or remove it")
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = f"'{value[:40]}'" if isinstance(value, str) else type(value).__name__
        raise DataError(
            f"{row.place}: field '{name}' is {shown}, but a score is a number; for classes set data.kind=classification"
        )
    if not abs(value) <= _LARGEST:
        raise DataError(
            f"{row.place}: field '{name}' is {str(value)[:40]}; a score is a finite number up to ±{_LARGEST:,.0f}: "
            "mend the row, or divide all scores"
        )
    return float(value)


def check_scores(splits: Mapping[str, Split[LabelledExample]]) -> None:
    """
    Raises:
        DataError: all scores of a split are -1.
    """
    for name, split in splits.items():
        if set(split.labels) == {_SECRET}:
            place = split.labels[_SECRET]
            raise DataError(
                f"{place}: every {name} score is -1, which stands for one that is kept secret; take rows with scores, "
                "as data.test_file, or of a dataset with data.test_split=validation"
            )


def check_some_scores(source: str, scores: Collection[Any]) -> None:
    """
    Raises:
        DataError: all training rows that are used have one score.
    """
    if len(set(scores)) == 1:
        raise DataError(f"{source}: every score of the rows used is {next(iter(scores)):g}: there is nothing to learn")


def describe_scores(scores: Collection[float]) -> dict[str, float]:
    """Smallest, mean and greatest."""
    return {
        "score_min": min(scores),
        "score_mean": math.fsum(scores) / len(scores),
        "score_max": max(scores),
    }


__all__ = ["OUTPUT_NAMES", "check_scores", "check_some_scores", "describe_scores", "score_of"]
