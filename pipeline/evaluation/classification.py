"""Rows to classify: one forward pass a batch; accuracy, F1, Matthews correlation and loss."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from ..bootstrap import INTERVAL_LEVEL
from ..classification_head import class_logits
from ..classification_scores import ClassificationScores
from ..data.batches import collate
from ..data.tokens import TokenizedSplit
from ..errors import ModelError
from ..formatting import code_span
from ..generation import length_sorted_batches
from ..stage_context import StageContext, VariantInputs
from .losses import finite_losses
from .task import Made, Pass, Row, Task, read_examples, variant_facts


@dataclass(frozen=True)
class ClassificationPass(Pass):
    """Rows {index, id, label, prediction, loss_nats, seen_in_train}: label and prediction are names of classes."""

    folder: ClassVar[str] = "predictions"
    examples: list[Row]
    tokens: TokenizedSplit
    label_names: list[str]
    batches: list[list[int]]
    is_wanted: bool = True

    def start(self, model: torch.nn.Module, tools: int, known: Sequence[Row]) -> Callable[[list[int]], Made]:
        """`tools` is the id of the padding."""
        # over what was there and what this process measures, as LossPass does it
        measured = {row["index"]: (row["loss_nats"], row["label"] == row["prediction"]) for row in known}

        def classify(batch: list[int]) -> Made:
            rows = self._rows(model, tools, batch)
            measured.update({row["index"]: (row["loss_nats"], row["label"] == row["prediction"]) for row in rows})
            metrics = {
                "loss_nats": math.fsum(loss for loss, _ in measured.values()) / len(measured),
                "accuracy_percent": 100 * sum(right for _, right in measured.values()) / len(measured),
            }
            return Made(rows, int(self.tokens.lengths[batch].sum()), metrics)

        return classify

    @torch.inference_mode()
    def _rows(self, model: torch.nn.Module, pad_id: int, batch: list[int]) -> list[Row]:
        """
        Raises:
            ModelError: the model's head is made for other classes.
        """
        collated = collate(self.tokens, [[index] for index in batch], pad_id, loss_on="row")
        log_p_BC = F.log_softmax(class_logits(model, collated), dim=-1).cpu()
        if log_p_BC.shape[1] != len(self.label_names):
            raise ModelError(
                f"the model tells {log_p_BC.shape[1]} classes apart, but the data have {len(self.label_names)}: its "
                "head was trained on other labels; run finetune again with --force"
            )
        labels_B = collated["row_labels"]
        loss_B = -log_p_BC.gather(1, labels_B.unsqueeze(1)).squeeze(1)
        rows = []
        for index, label, prediction, loss in zip(
            batch, labels_B.tolist(), log_p_BC.argmax(1).tolist(), loss_B.tolist(), strict=True
        ):
            rows.append(
                {
                    "index": index,
                    "id": self.examples[index]["id"],
                    "label": self.label_names[label],
                    "prediction": self.label_names[prediction],
                    "loss_nats": loss,
                    "seen_in_train": self.examples[index]["seen_in_train"],
                }
            )
        return rows


class ClassificationTask(Task):
    """Test rows of a text, or of a pair, and its class."""

    kind = "classification"
    rows_are = "rows"
    verb = "classifies"
    made = "predictions"

    def __init__(self, ctx: StageContext, tokens: TokenizedSplit) -> None:
        """
        Raises:
            DataError: there are no test rows.
        """
        prepare = ctx.inputs["prepare"]
        assert tokens.labels is not None, "prepare gives every row to classify its class"
        self.examples, self.tokens = read_examples(prepare, tokens), tokens
        self.label_names: list[str] = prepare.summary["label_names"]
        batches = length_sorted_batches(tokens.lengths.tolist(), ctx.config.evaluate.batch_size)
        self.passes = (ClassificationPass(self.examples, tokens, self.label_names, batches),)

    def load_tools(self, ctx: StageContext) -> int:
        return ctx.inputs["prepare"].summary["pad_id"]

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

    def results(self) -> dict[str, str]:
        return {"rows": ClassificationPass.folder}

    def _f1_class(self) -> str | None:
        """The class that F1 is of, or None where it is the mean over all."""
        return self.label_names[1] if len(self.label_names) == 2 else None

    def _label_counts(self) -> dict[str, int]:
        """How many test rows each class has, by its name."""
        assert self.tokens.labels is not None
        counted = Counter(self.tokens.labels.tolist())
        return {name: counted[number] for number, name in enumerate(self.label_names)}
