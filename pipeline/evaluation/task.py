"""The one interface of all kinds of test rows, which `stages/evaluate.py` works with.

Task        the test rows, how they are scored and told of
└ Pass      one way through them that every variant makes, with its batches and the files its rows go to
  └ Made    the rows of one batch
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..data.tokens import TokenizedSplit
from ..errors import DataError
from ..manifest import StageInput
from ..score_report import Measured
from ..stage_context import StageContext, VariantInputs

Row = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """What a batch gave."""

    rows: list[Row]
    """One for each of the batch, with its `index`."""
    num_tokens: int
    """New tokens where it generates, else those that were read for a loss."""
    metrics: dict[str, float]
    """For the progress line."""


class Pass(ABC):
    """One way through the test rows, batch by batch. It is done where every row is in its file."""

    folder: ClassVar[str]
    """Of its rows: a file a variant."""
    batches: list[list[int]]
    """Indices of rows; they depend on lengths and `evaluate.batch_size` alone, so that they are the same in a shard."""
    is_wanted: bool
    """False: the config leaves it out."""

    @abstractmethod
    def start(self, model: torch.nn.Module, tools: Any, known: Sequence[Row]) -> Callable[[list[int]], Made]:
        """What makes the rows of a batch with this model.

        Args:
            tools: what the task's `load_tools` gave.
            known: the rows of this variant that were there before.
        """


class Task(ABC):
    """The test rows as text and as tokens, in the same order, and what is measured on them."""

    kind: ClassVar[str]
    """`data.kind`."""
    rows_are: ClassVar[str]
    """What the test rows are called: "dialogues"."""
    verb: ClassVar[str]
    """What a variant does with them: "summarizes"."""
    made: ClassVar[str]
    """What the first pass makes: "summaries"."""
    examples: list[Row]
    """At least `id` and `seen_in_train` of each row."""
    tokens: TokenizedSplit
    passes: tuple[Pass, ...]
    """The first one's rows count as the rows that are done."""

    @abstractmethod
    def load_tools(self, ctx: StageContext) -> Any:
        """What the passes need beside a model. Only called where rows are missing: joining shards loads nothing."""

    @abstractmethod
    def score(self, ctx: StageContext, variant: VariantInputs, rows: Mapping[str, list[Row]]) -> Measured:
        """What a variant's rows are worth; `rows` by the folder of their pass.

        Raises:
            ModelError: a loss is not finite.
        """

    def settings(self, ctx: StageContext) -> dict[str, Any]:
        """How it was measured, for rouge.json."""
        return {}

    def counts(self) -> dict[str, Any]:
        """What rouge.json says of the test rows beside how many there are."""
        return {}

    @abstractmethod
    def notes(self, ctx: StageContext) -> list[str]:
        """The lines under the table of results.md."""

    def results(self) -> dict[str, str]:
        """Folders of rows that are of use by themselves, by what they are called on the terminal."""
        return {}

    def warnings(self, ctx: StageContext, figures: Mapping[str, Any]) -> list[str]:
        """What the reader of the scores should know."""
        return []

    def sample(self, ctx: StageContext, rows: Mapping[str, list[Row]]) -> str | None:
        """A row and what every variant made of it, for the terminal; `rows` of the first pass, by variant."""
        return None

    def num_seen_in_train(self) -> int:
        """How many of the test rows stand word for word in train."""
        return sum(bool(example["seen_in_train"]) for example in self.examples)


def read_examples(prepare: StageInput, tokens: TokenizedSplit) -> list[Row]:
    """The test rows as prepare wrote them.

    Raises:
        DataError: there are none.
    """
    with open(prepare.artifact("examples_test"), encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    if not examples:
        raise DataError("the test split has no rows: give data.test_file rows that fit data.max_length_tokens")
    assert len(examples) == len(tokens), "prepare writes examples and tokens in the same order"
    return examples


def rows_file(ctx: StageContext, folder: str, variant: str) -> Path:
    """Where a pass writes the rows of a variant."""
    return ctx.folder / folder / f"{variant}.jsonl"


def variant_facts(variant: VariantInputs) -> dict[str, Any]:
    """What a variant is, for rouge.json."""
    model = variant.config.model
    linear = model.attention == "linear"
    return {
        "attention": model.attention,
        "feature_map": model.feature_map if linear else None,
        "finetuned": not variant.inputs["finetune"].skipped,
        "kl_mean_nats": variant.inputs["distill"].summary.get("kl_mean") if linear else None,
    }
