"""Rows to classify: accuracy, F1, Matthews correlation and loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from ..bootstrap import INTERVAL_LEVEL
from ..classification_scores import ClassificationScores
from ..formatting import code_span
from ..stage_context import StageContext, VariantInputs
from .labelled import LabelledPass, LabelledTask
from .losses import finite_losses
from .task import Row, variant_facts


class ClassificationPass(LabelledPass):
    """Rows {…, loss_nats}: label and prediction are names of classes."""

    def told(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, batch: list[int]) -> list[dict[str, Any]]:
        log_p_BC = F.log_softmax(logits_BC, dim=-1)
        loss_B = -log_p_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        return [
            {"label": self.output_names[label], "prediction": self.output_names[prediction], "loss_nats": loss}
            for label, prediction, loss in zip(
                labels_B.tolist(), log_p_BC.argmax(1).tolist(), loss_B.tolist(), strict=True
            )
        ]

    def metrics(self, measured: Collection[Row]) -> dict[str, float]:
        return {
            "loss_nats": math.fsum(row["loss_nats"] for row in measured) / len(measured),
            "accuracy_percent": 100 * sum(row["label"] == row["prediction"] for row in measured) / len(measured),
        }


class ClassificationTask(LabelledTask):
    """Test rows of a text, or of a pair, and its class."""

    kind = "classification"
    verb = "classifies"
    pass_type = ClassificationPass

    @property
    def label_names(self) -> list[str]:
        """The classes, by their number."""
        return self.output_names

    def score(self, ctx: StageContext, variant: VariantInputs, rows: Mapping[str, list[Row]]) -> ClassificationScores:
        predictions = rows[ClassificationPass.folder]
        class_of = {name: number for number, name in enumerate(self.label_names)}
        return ClassificationScores(
            label=variant.label,
            labels_N=torch.tensor([class_of[row["label"]] for row in predictions]),
            predictions_N=torch.tensor([class_of[row["prediction"]] for row in predictions]),
            loss_N=finite_losses(variant, predictions),
            num_classes=len(self.label_names),
            facts=variant_facts(variant),
        )

    def settings(self, ctx: StageContext) -> dict[str, Any]:
        return {
            "metric": "accuracy, F1 and Matthews correlation, in points (x 100)",
            "f1_class": self._f1_class(),
        }

    def counts(self) -> dict[str, Any]:
        return {"label_counts": self._label_counts()}

    def notes(self, ctx: StageContext) -> list[str]:
        samples = ctx.config.evaluate.bootstrap_samples
        intervals = f", ± half of the {INTERVAL_LEVEL:.0%} bootstrap interval" if samples else ""
        name, num_rows = max(self._label_counts().items(), key=lambda entry: entry[1])
        f1_class = self._f1_class()
        f1 = "the mean over the classes" if f1_class is None else f"that of {code_span(f1_class)}"
        return [
            f"{len(self.examples)} test rows, {self.num_seen_in_train()} of which stand word for word in train "
            f"(`rouge.json` also has the scores without them), {ctx.config.engine.precision}. The most frequent label, "
            f"{code_span(name)}, is that of {num_rows / len(self.examples):.1%}.",
            f"Accuracy, F1 ({f1}) and MCC (Matthews correlation): x 100{intervals}. Loss (nats): per row, of its "
            "label. KL (nats): of the distilled from the softmax attention, after stage one. Train: minutes of distill "
            "+ finetune; memory: the peak of one process.",
        ]

    def _f1_class(self) -> str | None:
        """The class that F1 is of, or None where it is the mean over all."""
        return self.label_names[1] if len(self.label_names) == 2 else None

    def _label_counts(self) -> dict[str, int]:
        """How many test rows each class has, by its name."""
        assert self.tokens.labels is not None
        counted = Counter(self.tokens.labels.tolist())
        return {name: counted[number] for number, name in enumerate(self.label_names)}
