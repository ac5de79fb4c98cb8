"""Rows to score: Pearson and Spearman correlation, and the squared error."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..bootstrap import INTERVAL_LEVEL
from ..regression_scores import RegressionScores
from ..stage_context import StageContext, VariantInputs
from .labelled import LabelledPass, LabelledTask
from .losses import finite_losses
from .task import Row, variant_facts


class RegressionPass(LabelledPass):
    """Rows {…, squared_error}: label and prediction are scores."""

    def told(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, batch: list[int]) -> list[dict[str, Any]]:
        labels = [self.examples[index]["label"] for index in batch]  # as they were written, not in float32
        return [
            {"label": label, "prediction": prediction, "squared_error": (prediction - label) ** 2}
            for label, prediction in zip(labels, logits_BC[:, 0].tolist(), strict=True)
        ]

    def metrics(self, measured: Collection[Row]) -> dict[str, float]:
        return {"loss_mse": math.fsum(row["squared_error"] for row in measured) / len(measured)}


class RegressionTask(LabelledTask):
    """Test rows of a text, or of a pair, and its score."""

    kind = "regression"
    verb = "scores"
    pass_type = RegressionPass

    def score(self, ctx: StageContext, variant: VariantInputs, rows: Mapping[str, list[Row]]) -> RegressionScores:
        predictions = rows[RegressionPass.folder]
        finite_losses(variant, predictions, "squared_error")
        return RegressionScores(
            label=variant.label,
            scores_N=torch.tensor([row["label"] for row in predictions], dtype=torch.float64),
            predictions_N=torch.tensor([row["prediction"] for row in predictions], dtype=torch.float64),
            facts=variant_facts(variant),
        )

    def settings(self, ctx: StageContext) -> dict[str, Any]:
        return {"metric": "Pearson and Spearman correlation, in points (x 100); mean squared error"}

    def counts(self) -> dict[str, Any]:
        """Their mean and variance: the squared error of who always says the mean."""
        mean, variance = self._moments()
        return {"score_mean": mean, "score_variance": variance}

    def notes(self, ctx: StageContext) -> list[str]:
        samples = ctx.config.evaluate.bootstrap_samples
        intervals = f", ± half of the {INTERVAL_LEVEL:.0%} bootstrap interval" if samples else ""
        mean, variance = self._moments()
        return [
            f"{len(self.examples)} test rows, {self.num_seen_in_train()} of which stand word for word in train "
            f"(`rouge.json` also has the scores without them), {ctx.config.engine.precision}. Who always says their "
            f"mean, {mean:.4g}, has a squared error of {variance:.4g}.",
            f"Pearson and Spearman: correlation of the predicted with the rows' scores, x 100{intervals}. Sq. error: "
            "mean over the rows. KL (nats): of the distilled from the softmax attention, after stage one. Train: "
            "minutes of distill + finetune; memory: the peak of one process.",
        ]

    def _moments(self) -> tuple[float, float]:
        labels = [example["label"] for example in self.examples]
        mean = math.fsum(labels) / len(labels)
        return mean, math.fsum((label - mean) ** 2 for label in labels) / len(labels)
