"""The loss of finetuning an encoder: nats on the rows' classes, or squares of how far their scores are missed."""

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
    """An encoder with adapters, and its loss summed over a batch's labels."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Σ −log p(class) over the rows, or Σ (output − score)², in float32, a scalar.

        Args:
            batch: as `collate` gives it of labelled rows: what `class_logits` reads, and `row_labels` (B,), int64
                classes or float32 scores.
        """
        logits_BC, labels_B = class_logits(self.model.get_base_model(), batch), batch["row_labels"]
        if labels_B.is_floating_point():
            return F.mse_loss(logits_BC.squeeze(1), labels_B, reduction="sum")
        return F.cross_entropy(logits_BC, labels_B, reduction="sum")
