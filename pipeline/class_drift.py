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
    """A few test rows, padded on the right: int64 (B, L), and their texts."""

    input_ids_BL: Tensor
    mask_BL: Tensor
    token_type_ids_BL: Tensor
    texts: list[list[str]]
    """One text a row, or two."""
    rows: list[list[int]]
    """Their tokens."""


def make_class_probe(split: TokenizedSplit, examples_file: Path, pad_id: int) -> ClassProbe:
    """The first rows of a split whose texts stand in `examples_file`, one JSON object a line, in the same order."""
    with open(examples_file, encoding="utf-8") as file:
        examples = [json.loads(line) for line, _ in zip(file, range(PROBE_ROWS), strict=False)]
    numbers = range(min(len(examples), len(split)))
    batch = collate(split, [[number] for number in numbers], pad_id, "all")
    texts = [[example["text"], *([example["second_text"]] if "second_text" in example else [])] for example in examples]
    return ClassProbe(
        input_ids_BL=batch["input_ids"],
        mask_BL=batch["mask"].long(),
        token_type_ids_BL=batch["token_type_ids"],
        texts=texts,
        rows=[split[number][0].tolist() for number in numbers],
    )


@torch.inference_mode()
def class_logits(model: Any, probe: ClassProbe) -> Tensor:
    """(B, C), float32, of a model in this process."""
    device = next(model.parameters()).device
    logits_BC = model(
        input_ids=probe.input_ids_BL.to(device),
        attention_mask=probe.mask_BL.to(device),
        token_type_ids=probe.token_type_ids_BL.to(device),
    ).logits
    return logits_BC.float().cpu()


def class_logits_in_clean_process(
    model_folder: Path, probe: ClassProbe, *, device: torch.device, trust_remote_code: bool
) -> tuple[Tensor, dict[str, Any]]:
    """The exported folder's logits, and facts about the load.

    Raises:
        ModelError: the folder does not load there, lacks weights, or its tokenizer gives other tokens.
        Interrupted: a signal came.
    """
    tensors, facts = ask_clean_process(
        model_folder,
        {
            "input_ids": probe.input_ids_BL,
            "attention_mask": probe.mask_BL,
            "token_type_ids": probe.token_type_ids_BL,
        },
        {"task": "classify", "trust_remote_code": trust_remote_code, "texts": probe.texts},
        device,
    )
    # what prepare cut from the end of a long row, the tokenizer by itself does not
    whole = [tokens for tokens, row in zip(facts["encoded_rows"], probe.rows, strict=True) if len(tokens) <= len(row)]
    rows = [row for tokens, row in zip(facts["encoded_rows"], probe.rows, strict=True) if len(tokens) <= len(row)]
    check_tokens(model_folder, (tokens == row for tokens, row in zip(whole, rows, strict=True)))
    return tensors["logits"], facts
