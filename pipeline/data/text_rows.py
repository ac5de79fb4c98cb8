"""Running text becomes rows of equal length, for runs on plain text (`data.kind: text`):

    documents, EOS behind each ──▶ one stream of tokens ──▶ [BOS] data.max_length_tokens - 1 of them, again and again

A row's first token is its prompt: all others are predicted, so that the loss of finetuning and of evaluation is that of
language modelling, each row by itself. BOS stands where the tokenizer has one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..config import DataConfig
from ..errors import DataError
from ..interrupts import stop_if_asked
from .examples import Source, SplitCounts
from .sources import SPLITS, read_sources_of, sample, text_of
from .tokenize import TextEncoder
from .tokens import TokenizedSplit

_CHARACTERS_AT_ONCE = 1 << 20
"""Text per call of the tokenizer."""
_LONGEST_PIECE = 1 << 16
"""Characters that are tokenized as one."""
_SHORTEST_ROW = 16
"""Tokens; what is left over at a split's end and is shorter is dropped."""


@dataclass
class TextSplit:
    """Rows of one split, where they came from, and what became of what was read."""

    rows: TokenizedSplit
    source: str
    counts: SplitCounts


def read_text_splits(
    tokenizer: Any, data: DataConfig, generator: Callable[[str], torch.Generator]
) -> dict[str, TextSplit]:
    """Train, validation and test as rows of `data.max_length_tokens` tokens.

    Without a source of its own, validation is `data.num_validation_examples` rows of train. `data.max_train_examples`
    samples rows; `data.max_test_examples` takes the first ones.

    Raises:
        DataError: a split without a source or without rows, a file that cannot be read, a row without text.
        Interrupted: a signal came; nothing is saved.
    """
    splits = {}
    for name, source in read_sources_of(data).items():
        rows, num_texts, num_empty = _cut(tokenizer, source, data)
        if not len(rows):
            raise DataError(
                f"{source.name}: less text than a row of {_SHORTEST_ROW} tokens ({num_texts} texts, {num_empty} empty)"
            )
        splits[name] = TextSplit(rows, source.name, SplitCounts(rows=len(rows)))
    train, test = splits["train"], splits["test"]
    if "validation" in splits:
        _keep(splits["validation"], data.num_validation_examples, generator("validation sample"))
    else:
        splits["validation"] = _hold_out(train, data.num_validation_examples, generator("validation held out"))
    if data.max_train_examples is not None:
        _keep(train, data.max_train_examples, generator("train sample"))
    if data.max_test_examples is not None and len(test.rows) > data.max_test_examples:
        test.counts.left_out = len(test.rows) - data.max_test_examples
        test.rows = _take(test.rows, list(range(data.max_test_examples)))
    in_train = RowSet(train.rows)
    for name, split in splits.items():
        split.counts.used = len(split.rows)
        if name != "train":
            split.counts.seen_in_train = sum(in_train.holds(split.rows))
    return {name: splits[name] for name in SPLITS}


class RowSet:
    """Which rows of tokens there are."""

    def __init__(self, rows: TokenizedSplit) -> None:
        self._rows = {_digest(rows, number) for number in range(len(rows))}

    def holds(self, rows: TokenizedSplit) -> list[bool]:
        """Whether each row of another split is one of these, token for token."""
        return [_digest(rows, number) in self._rows for number in range(len(rows))]


def _digest(rows: TokenizedSplit, number: int) -> bytes:
    start, end = int(rows.offsets[number]), int(rows.offsets[number + 1])
    return hashlib.blake2b(rows.input_ids[start:end].numpy().tobytes(), digest_size=16).digest()


def _cut(tokenizer: Any, source: Source, data: DataConfig) -> tuple[TokenizedSplit, int, int]:
    """The rows of a source, the number of its texts, and of those that were empty."""
    encoder = TextEncoder(tokenizer)
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = data.max_length_tokens - len(head)
    flat, offsets, waiting = array("i"), array("q", [0]), array("i")

    def close(lengths: list[int]) -> None:
        """Make rows of these many waiting tokens each."""
        start = 0
        for length in lengths:
            flat.extend(head)
            flat.extend(waiting[start : start + length])
            offsets.append(len(flat))
            start += length
        del waiting[:start]  # once: it moves all that go on waiting

    counts = _Counts()
    end = tokenizer.eos_token_id if data.text_end == "eos" else None
    is_one = source.is_one_text or data.text_end == "nothing"
    for texts, go_on, ends in _batches(source, data, counts, is_one):
        stop_if_asked("tokenizing begins anew")
        for ids, is_end in zip(encoder.pieces(texts, go_on), ends, strict=True):
            waiting.extend(ids)
            if is_end and end is not None:
                waiting.append(end)
        close([body] * (len(waiting) // body))
    if source.is_one_text and end is not None and counts.texts > counts.empty:
        waiting.append(end)
    close([body] * (len(waiting) // body))
    if len(waiting) + len(head) >= _SHORTEST_ROW:
        close([len(waiting)])
    rows = TokenizedSplit(
        torch.frombuffer(flat, dtype=torch.int32) if flat else torch.empty(0, dtype=torch.int32),
        torch.frombuffer(offsets, dtype=torch.int64),
        torch.ones(len(offsets) - 1, dtype=torch.int32),
    )
    return rows, counts.texts, counts.empty


@dataclass
class _Counts:
    texts: int = 0
    empty: int = 0


def _batches(
    source: Source, data: DataConfig, counts: _Counts, is_one: bool
) -> Iterator[tuple[list[str], list[bool], list[bool]]]:
    """Texts to tokenize together, which of them go on with what came before, and behind which a document ends.

    Args:
        is_one: whether all rows are one text.
    """
    texts: list[str] = []
    go_on: list[bool] = []
    ends: list[bool] = []
    num_characters, begun = 0, False
    for row in source.read():
        counts.texts += 1
        text = text_of(row, data)
        # an empty line of one text is a part of it; a text of white space is none
        if not text or not (is_one or text.strip()):
            counts.empty += 1
            continue
        pieces = _pieces(text)
        for number, piece in enumerate(pieces, start=1):
            texts.append(piece)
            go_on.append(number > 1 or (is_one and begun))
            begun = True
            ends.append(number == len(pieces) and not source.is_one_text)
            num_characters += len(piece)
            if num_characters >= _CHARACTERS_AT_ONCE:
                yield texts, go_on, ends
                texts, go_on, ends, num_characters = [], [], [], 0
    if texts:
        yield texts, go_on, ends


def _pieces(text: str) -> list[str]:
    """A text in parts that the tokenizer can hold: it takes some ninety bytes for each character of one.

    A part ends before white space, where there is any within its second half: words stay whole.
    """
    pieces, start = [], 0
    while len(text) - start > _LONGEST_PIECE:
        end, half = start + _LONGEST_PIECE, start + _LONGEST_PIECE // 2
        spaces = [text.rfind(space, half, end) for space in ("\n", " ")]
        cut = next((place for place in spaces if place > 0), end)
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]


def _take(rows: TokenizedSplit, indices: list[int]) -> TokenizedSplit:
    """These rows, in this order."""
    lengths = rows.lengths[indices]
    pieces = [rows.input_ids[int(rows.offsets[i]) : int(rows.offsets[i + 1])] for i in indices]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return TokenizedSplit(torch.cat(pieces), offsets, rows.prompt_lengths[indices])


def _keep(split: TextSplit, size: int, generator: torch.Generator) -> None:
    if len(split.rows) > size:
        split.counts.left_out += len(split.rows) - size
        split.rows = _take(split.rows, sample(len(split.rows), size, generator))


def _hold_out(train: TextSplit, size: int, generator: torch.Generator) -> TextSplit:
    if size * 2 > len(train.rows):
        raise DataError(
            f"{train.source}: {len(train.rows)} rows are too few to hold {size} out for validation; lower "
            "data.num_validation_examples or give data.validation_file"
        )
    chosen = sample(len(train.rows), size, generator)
    others = sorted(set(range(len(train.rows))) - set(chosen))
    held_out = TextSplit(_take(train.rows, chosen), f"{train.source} (held out)", SplitCounts(rows=size))
    train.counts.held_out = size
    train.rows = _take(train.rows, others)
    return held_out


def describe_counts(splits: Mapping[str, TextSplit]) -> dict[str, dict[str, int]]:
    """Counts of each split, and its tokens, as a manifest's summary has them."""
    figures = {}
    for name, split in splits.items():
        lengths = split.rows.lengths.sort().values
        figures[name] = {
            **split.counts.as_dict(),
            "tokens": int(lengths.sum()),
            "length_p50": int(lengths[len(lengths) // 2]),
            "length_max": int(lengths[-1]),
        }
    return figures


__all__ = ["RowSet", "TextSplit", "describe_counts", "read_text_splits"]
