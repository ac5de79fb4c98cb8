"""Labelled rows become rows of tokens, with the tokenizer's own special tokens:

    [CLS] text [SEP]        or        [CLS] text [SEP] │ second text [SEP]

The border of a pair is where its token types go from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import DataConfig
from ..errors import ModelError
from ..interrupts import stop_if_asked
from .examples import LabelledExample
from .tokens import TokenizedSplit

_ROWS_AT_ONCE = 1000
"""Rows per call of the tokenizer, as in tokenize.py."""


@dataclass
class TokenizedRows:
    """Rows that fit, as tokens and as text in the same order, and what became of the others."""

    split: TokenizedSplit
    examples: list[LabelledExample]
    """With their whole texts, of a truncated one too."""
    dropped_overlong: int = 0
    truncated: int = 0


class RowEncoder:
    """Texts and pairs to tokens. `[SEP]` and its like inside a text are plain characters.

    Raises:
        ModelError: the tokenizer does not mark texts and pairs as a BERT reads them.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        for second in (None, "b"):
            ids, types = self._encode(["a"], None if second is None else [second], None)
            ends = tokenizer.cls_token_id is not None and ids[0][0] == tokenizer.cls_token_id
            ends = ends and tokenizer.sep_token_id is not None and ids[0][-1] == tokenizer.sep_token_id
            if not ends or types[0] != sorted(types[0]) or types[0][0] != 0 or types[0][-1] != int(second is not None):
                name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
                raise ModelError(
                    f"the tokenizer ({name}) does not put [CLS] and [SEP] around a text and type 1 on a pair's second: "
                    "it belongs to no BERT; model.tokenizer names another one"
                )

    def rows(
        self, texts: Sequence[str], second_texts: Sequence[str] | None, max_length: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Tokens of the first text, and of the second (none of single texts), with their special tokens.

        A row of more than `max_length` loses tokens at the end, of a pair always those of the text that is longer.
        """
        if not texts:
            return []
        ids, types = self._encode(texts, second_texts, max_length)
        borders = [row.index(1) if row[-1] else len(row) for row in types]
        return [(row[:border], row[border:]) for row, border in zip(ids, borders, strict=True)]

    def _encode(
        self, texts: Sequence[str], second_texts: Sequence[str] | None, max_length: int | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        encoded = self._tokenizer(
            list(texts),
            None if second_texts is None else list(second_texts),
            truncation="do_not_truncate" if max_length is None else "longest_first",
            max_length=max_length,
            split_special_tokens=True,
            return_token_type_ids=True,
            verbose=False,
        )
        return encoded.input_ids, encoded.token_type_ids


def tokenize_rows(tokenizer: Any, examples: Sequence[LabelledExample], data: DataConfig) -> TokenizedRows:
    """Tokenize a split whose labels are numbers (of classes, or scores) and apply `data.overlong` to rows beyond
    `data.max_length_tokens`.

    Raises:
        ModelError: the tokenizer is no BERT's.
        Interrupted: a signal came; nothing is saved.
    """
    encoder = RowEncoder(tokenizer)
    result = TokenizedRows(TokenizedSplit.from_rows([], []), [])
    labels: list[int | float] = []

    def texts_of(some: Sequence[LabelledExample]) -> tuple[list[str], list[str] | None]:
        seconds = [example.second_text for example in some if example.second_text is not None]
        return [example.text for example in some], seconds or None

    def rows() -> Iterator[tuple[list[int], list[int]]]:
        for start in range(0, len(examples), _ROWS_AT_ONCE):
            stop_if_asked("tokenizing begins anew")
            batch = examples[start : start + _ROWS_AT_ONCE]
            for example, row in zip(batch, encoder.rows(*texts_of(batch)), strict=True):
                if sum(map(len, row)) > data.max_length_tokens:
                    if data.overlong == "drop":
                        result.dropped_overlong += 1
                        continue
                    result.truncated += 1
                    (row,) = encoder.rows(*texts_of([example]), data.max_length_tokens)
                result.examples.append(example)
                assert not isinstance(example.label, str), "number_labels has made a class its number"
                labels.append(example.label)
                yield row

    result.split = TokenizedSplit.from_rows(rows(), labels)
    return result
