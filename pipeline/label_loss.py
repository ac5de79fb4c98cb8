"""The loss of finetuning an encoder: nats on the rows' labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from .classification_head import class_logits

if TYPE_CHECKING:
    from peft import PeftModel


class LabelLoss(nn.Module):
    """An encoder with adapters, and its summed cross-entropy over a batch's labels."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Σ −log p(label) over the rows, in float32, a scalar.

        Args:
            batch: as `collate` gives it of rows to classify: what `class_logits` reads, and `row_labels` int64 (B,).
        """
        logits_BC = class_logits(self.model.get_base_model(), batch)
        return F.cross_entropy(logits_BC, batch["row_labels"], reduction="sum")
