"""The loss on test rows: of the reference summaries, or of running text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..data.tokens import TokenizedSplit
from ..errors import ModelError
from ..generation import reference_losses
from ..stage_context import VariantInputs
from .task import Made, Pass, Row


@dataclass(frozen=True)
class LossPass(Pass):
    """Rows {index, loss_nats, num_tokens}: the loss summed over the tokens behind each row's prompt."""

    folder: ClassVar[str] = "reference_losses"
    tokens: TokenizedSplit
    batches: list[list[int]]
    is_wanted: bool = True

    def start(self, model: torch.nn.Module, tools: Any, known: Sequence[Row]) -> Callable[[list[int]], Made]:
        """`tools` is a Generation."""
        # Over what was there and what this process measures: alone it ends at the table's loss. fsum: an attempt that
        # was killed and resumed shows the same numbers, whatever was measured when.
        measured = {row["index"]: (row["loss_nats"], row["num_tokens"]) for row in known}

        def measure(batch: list[int]) -> Made:
            losses = reference_losses(model, [self.tokens[index] for index in batch], tools.config.pad_token_id)
            measured.update(zip(batch, losses, strict=True))
            mean_nats = math.fsum(loss for loss, _ in measured.values()) / sum(num for _, num in measured.values())
            rows = [
                {"index": index, "loss_nats": loss, "num_tokens": num_tokens}
                for index, (loss, num_tokens) in zip(batch, losses, strict=True)
            ]
            return Made(rows, sum(num_tokens for _, num_tokens in losses), {"loss_nats": mean_nats})

        return measure


def finite_losses(variant: VariantInputs, rows: Sequence[Row], key: str = "loss_nats") -> torch.Tensor:
    """The rows' losses, float64 (N,).

    Raises:
        ModelError: one is not finite.
    """
    bad = [row["index"] for row in rows if not math.isfinite(row[key])]
    if bad:
        raise ModelError(
            f"{variant.label}: the loss of {len(bad)} test rows is not finite (first: row {bad[0]}); the "
            "model's weights or feature maps hold NaN or overflow: look at its distill and finetune metrics"
        )
    return torch.tensor([row[key] for row in rows], dtype=torch.float64)


def token_losses(variant: VariantInputs, rows: Sequence[Row] | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Losses and tokens of a LossPass, (N,) each; None where it was left out."""
    if rows is None:
        return None, None
    return finite_losses(variant, rows), torch.tensor([row["num_tokens"] for row in rows])
