"""How far an exported encoder is from the unmerged one: logits of the classes for a few test rows.

As in drift.py, the exported side runs in a fresh interpreter without this project.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.batches import collate
from .data.tokens import TokenizedSplit
from .drift import ask_clean_process, check_tokens

PROBE_ROWS = 32


@dataclass(frozen=True)
class ClassProbe:
    """A few test rows, padded on the right, and their texts."""

    batch: dict[str, Tensor]
    """As `collate` gives it."""
    texts: list[list[str]]
    """One text a row, or two."""
    rows: list[list[int]]
    """Their tokens."""
    max_length: int
    """More tokens than this were cut from a row's end."""


def make_class_probe(split: TokenizedSplit, examples_file: Path, pad_id: int, max_length: int) -> ClassProbe:
    """The first rows of a split whose texts stand in `examples_file`, one JSON object a line, in the same order."""
    with open(examples_file, encoding="utf-8") as file:
        examples = [json.loads(line) for line, _ in zip(file, range(PROBE_ROWS), strict=False)]
    numbers = range(len(examples))
    return ClassProbe(
        batch=collate(split, [[number] for number in numbers], pad_id, "row"),
        texts=[[row[name] for name in ("text", "second_text") if name in row] for row in examples],
        rows=[split[number][0].tolist() for number in numbers],
        max_length=max_length,
    )


def class_logits_in_clean_process(
    model_folder: Path, probe: ClassProbe, *, device: torch.device, trust_remote_code: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The exported folder's logits, float32 (B, C), and facts about the load.

    Raises:
        ModelError: the folder does not load there, lacks weights, or its tokenizer gives other tokens.
        Interrupted: a signal came.
    """
    tensors, facts = ask_clean_process(
        model_folder,
        {
            "input_ids": probe.batch["input_ids"],
            "attention_mask": probe.batch["mask"].long(),
            "token_type_ids": probe.batch["token_type_ids"],
        },
        {
            "task": "classify",
            "trust_remote_code": trust_remote_code,
            "texts": probe.texts,
            "max_length": probe.max_length,
        },
        device,
    )
    check_tokens(model_folder, (row == own for row, own in zip(facts["encoded_rows"], probe.rows, strict=True)))
    return tensors["logits"], facts


__all__ = ["PROBE_ROWS", "ClassProbe", "class_logits_in_clean_process", "make_class_probe"]
