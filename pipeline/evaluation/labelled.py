"""Labelled rows, whose class or score an encoder tells: one forward pass a batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..classification_head import class_logits
from ..data.batches import collate
from ..data.tokens import TokenizedSplit
from ..errors import ModelError
from ..generation import length_sorted_batches
from ..stage_context import StageContext
from .task import Made, Pass, Row, Task, read_examples


@dataclass(frozen=True)
class LabelledPass(Pass):
    """Rows {index, id, seen_in_train, …}, with what `told` says of each."""

    folder: ClassVar[str] = "predictions"
    examples: list[Row]
    tokens: TokenizedSplit
    output_names: list[str]
    """What the outputs of the head are called."""
    batches: list[list[int]]
    is_wanted: bool = True

    @abstractmethod
    def told(self, logits_BC: torch.Tensor, labels_B: torch.Tensor, batch: list[int]) -> list[dict[str, Any]]:
        """Label, prediction and loss of each row of a batch.

        Args:
            logits_BC: float32, on the CPU. labels_B: as prepare tokenized them. batch: indices of the rows.
        """

    @abstractmethod
    def metrics(self, measured: Collection[Row]) -> dict[str, float]:
        """What the progress line shows of the rows so far."""

    def start(self, model: torch.nn.Module, tools: int, known: Sequence[Row]) -> Callable[[list[int]], Made]:
        """`tools` is the id of the padding."""
        # over what was there and what this process measures, as LossPass does it
        measured = {row["index"]: row for row in known}

        def tell(batch: list[int]) -> Made:
            rows = self._rows(model, tools, batch)
            measured.update({row["index"]: row for row in rows})
            return Made(rows, int(self.tokens.lengths[batch].sum()), self.metrics(measured.values()))

        return tell

    @torch.inference_mode()
    def _rows(self, model: torch.nn.Module, pad_id: int, batch: list[int]) -> list[Row]:
        """
        Raises:
            ModelError: the model's head is made for other classes.
        """
        collated = collate(self.tokens, [[index] for index in batch], pad_id, loss_on="row")
        logits_BC = class_logits(model, collated).cpu()
        if logits_BC.shape[1] != len(self.output_names):
            raise ModelError(
                f"the model's head has {logits_BC.shape[1]} outputs, but the data need {len(self.output_names)}: it "
                "was trained on other labels; run finetune again with --force"
            )
        return [
            {"index": index, "id": self.examples[index]["id"]}
            | told
            | {"seen_in_train": self.examples[index]["seen_in_train"]}
            for index, told in zip(batch, self.told(logits_BC, collated["row_labels"], batch), strict=True)
        ]


class LabelledTask(Task):
    """Test rows of a text, or of a pair, and its label."""

    rows_are = "rows"
    made = "predictions"
    pass_type: ClassVar[type[LabelledPass]]
    """The way through them."""

    def __init__(self, ctx: StageContext, tokens: TokenizedSplit) -> None:
        """
        Raises:
            DataError: there are no test rows.
        """
        prepare = ctx.inputs["prepare"]
        assert tokens.labels is not None, "prepare gives every such row its label"
        self.examples, self.tokens = read_examples(prepare, tokens), tokens
        self.output_names: list[str] = prepare.summary["label_names"]
        batches = length_sorted_batches(tokens.lengths.tolist(), ctx.config.evaluate.batch_size)
        self.passes = (self.pass_type(self.examples, tokens, self.output_names, batches),)

    def load_tools(self, ctx: StageContext) -> int:
        return ctx.inputs["prepare"].summary["pad_id"]

    def results(self) -> dict[str, str]:
        return {"rows": LabelledPass.folder}
