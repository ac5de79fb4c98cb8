"""Summaries from a model, and its loss on reference summaries: batches of prompts, left-padded.

Left padding puts every prompt's last token in the same column, where generation goes on. The batches are fixed by
the prompts' lengths and the batch size alone, so that a batch that is computed again gives the same tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import ConfigError
from .memory_estimate import LOGITS_AT_ONCE

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from .config import EvaluateConfig


@dataclass(frozen=True)
class GeneratedSummary:
    """New tokens without the end token. `truncated`: the limit came before the model ended the summary."""

    token_ids: list[int]
    truncated: bool


def room_for_answers(num_positions: int | None, longest_prompt: int) -> int:
    """New tokens that a model may generate after prompts of that many tokens; the last one is never read.

    Args:
        num_positions: of a model whose positions are a table; None where any position can be had.
    """
    return sys.maxsize if num_positions is None else num_positions - longest_prompt + 1


def check_room(num_positions: int | None, longest_prompt: int, max_new_tokens: int, whose: str, cure: str) -> None:
    """
    Raises:
        ConfigError: `evaluate.max_new_tokens` asks for positions that the model does not have.
    """
    room = room_for_answers(num_positions, longest_prompt)
    if max_new_tokens > room:
        fewer = f"evaluate.max_new_tokens={room}, or " if room >= 1 else ""
        raise ConfigError(
            f"evaluate.max_new_tokens: {whose} has {longest_prompt} tokens, with {max_new_tokens} new ones more than "
            f"the {num_positions} positions that the base model has: {fewer}{cure}."
        )


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the rows in batches of similar length, longest first (what does not fit in memory fails at once)."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def left_pad(rows: Sequence[Tensor], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` (1: real token) and `position_ids` (0 at the first real token), int64 (B, L)."""
    longest = max(len(row) for row in rows)
    input_ids_BL = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask_BL = torch.zeros_like(input_ids_BL)
    for b, row in enumerate(rows):
        input_ids_BL[b, longest - len(row) :] = row
        mask_BL[b, longest - len(row) :] = 1
    position_ids_BL = (mask_BL.cumsum(1) - 1).clamp_min(0)
    return {
        "input_ids": input_ids_BL.to(device),
        "attention_mask": mask_BL.to(device),
        "position_ids": position_ids_BL.to(device),
    }


def make_generation_config(
    settings: EvaluateConfig, *, bos_id: int | None, eos_id: int, pad_id: int
) -> GenerationConfig:
    """Greedy or beam search as the config says; the sampling settings that a base model ships do not apply."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=settings.num_beams,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        use_cache=True,
    )


@torch.inference_mode()
def generate_summaries(
    model: torch.nn.Module, prompts: Sequence[Tensor], generation_config: GenerationConfig
) -> list[GeneratedSummary]:
    """Continue every prompt (1-D int token ids) until the end token or `max_new_tokens`.

    The model's own generation defaults (Llama-2's: sampling at temperature 0.6) are replaced by
    `generation_config`, because generate() would fill unset fields from them.
    """
    eos_id, pad_id = generation_config.eos_token_id, generation_config.pad_token_id
    assert isinstance(eos_id, int) and isinstance(pad_id, int)
    device = next(model.parameters()).device
    batch = left_pad(prompts, pad_id, device)
    prompt_length = batch["input_ids"].shape[1]
    model.generation_config = generation_config  # type: ignore[assignment]
    output_BL = model.generate(  # type: ignore[operator]
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        generation_config=generation_config,
    )
    summaries = []
    for tokens in output_BL[:, prompt_length:].tolist():
        ended = eos_id in tokens
        # without an end token nothing was padded either: the row filled all of max_new_tokens
        summaries.append(GeneratedSummary(tokens[: tokens.index(eos_id)] if ended else tokens, not ended))
    return summaries


@torch.inference_mode()
def reference_losses(
    model: torch.nn.Module, rows: Sequence[tuple[Tensor, int]], pad_id: int
) -> list[tuple[float, int]]:
    """Teacher-forced loss of every row's summary: (nats summed over its tokens, number of tokens).

    `rows`: (token ids of prompt + summary + end token, prompt length). The end token counts; the prompt does not.
    Logits are formed for the summaries only, and the log-softmax in float32.
    """
    device = next(model.parameters()).device
    batch = left_pad([row for row, _ in rows], pad_id, device)
    num_targets_B = torch.tensor([len(row) - prompt_length for row, prompt_length in rows], device=device)
    longest = int(num_targets_B.max())
    targets_BL = batch["input_ids"][:, -longest:]
    hidden_BLE = model.base_model(**batch, use_cache=False).last_hidden_state[:, -longest - 1 : -1]  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    # a few columns at a time: a wide vocabulary's logits of whole rows of text are larger than the model
    at_once = max(1, LOGITS_AT_ONCE // (len(rows) * head.weight.shape[0]))
    losses = [
        F.cross_entropy(head(hidden_BCE).float().transpose(1, 2), targets_BC, reduction="none")
        for hidden_BCE, targets_BC in zip(hidden_BLE.split(at_once, 1), targets_BL.split(at_once, 1), strict=True)
    ]
    loss_BL = torch.cat(losses, dim=1)
    # left padding: a row's summary is its last num_targets columns
    column_L = torch.arange(longest, device=device)
    is_summary_BL = column_L >= longest - num_targets_B[:, None]
    loss_B = loss_BL.double().masked_fill(~is_summary_BL, 0).sum(1)
    return list(zip(loss_B.tolist(), num_targets_B.tolist(), strict=True))
