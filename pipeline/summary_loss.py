"""The loss of finetuning: nats on the summary's tokens, with logits at those positions only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from .data.batches import NO_LOSS

if TYPE_CHECKING:
    from peft import PeftModel


class SummaryLoss(nn.Module):
    """A model with adapters, and its summed cross-entropy over a batch's labels.

    A prompt is many times longer than its summary and the vocabulary is wide, so the last hidden states are picked
    before the language-model head: the head's time and memory go with the summaries' length.

    Args:
        packed: the batches hold several rows a sequence, and attention must stop at their borders.
    """

    def __init__(self, model: PeftModel, *, packed: bool) -> None:
        super().__init__()
        self.model = model
        self._packed = packed

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Σ −log p(label) in float32, a scalar. No mask is needed: right padding is invisible to causal attention."""
        causal_lm: Any = self.model.get_base_model()
        hidden_BLE = causal_lm.decoder(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            segment_ids=batch["segment_ids"] if self._packed else None,
            use_cache=False,
        ).last_hidden_state
        targets_BL = batch["labels"][:, 1:]  # position i predicts token i + 1
        wanted_BL = targets_BL != NO_LOSS
        logits_NV = causal_lm.lm_head(hidden_BLE[:, :-1][wanted_BL])
        return F.cross_entropy(logits_NV.float(), targets_BL[wanted_BL], reduction="sum")
