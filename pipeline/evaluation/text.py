"""Running text: every variant reads it; loss and perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bootstrap import INTERVAL_LEVEL
from ..data.text_rows import RowSet
from ..data.tokens import TokenizedSplit
from ..errors import ConfigError
from ..generation import length_sorted_batches
from ..score_report import VariantScores
from ..stage_context import StageContext, VariantInputs
from .dialogues import Generation, load_generation
from .losses import LossPass, token_losses
from .task import Row, Task, variant_facts


class TextTask(Task):
    """Rows of tokens: there is nothing to generate, and no text beside them."""

    kind = "text"
    rows_are = "rows of text"
    verb = "reads"
    made = "losses"

    def __init__(self, ctx: StageContext, tokens: TokenizedSplit) -> None:
        """
        Raises:
            ConfigError: `evaluate.perplexity` is off.
        """
        settings = ctx.config.evaluate
        if not settings.perplexity:
            raise ConfigError("evaluate.perplexity: false leaves nothing to measure on running text; set it to true.")
        seen = RowSet(TokenizedSplit.open(ctx.inputs["prepare"].artifact("tokens_train"))).holds(tokens)
        self.examples = [{"id": f"row-{number}", "seen_in_train": is_seen} for number, is_seen in enumerate(seen)]
        self.tokens = tokens
        self.passes = (LossPass(tokens, length_sorted_batches(tokens.lengths.tolist(), settings.batch_size)),)

    def load_tools(self, ctx: StageContext) -> Generation:
        return load_generation(ctx)

    def score(self, ctx: StageContext, variant: VariantInputs, rows: Mapping[str, list[Row]]) -> VariantScores:
        loss_N, num_tokens_N = token_losses(variant, rows[LossPass.folder])
        return VariantScores(
            label=variant.label,
            rouge=None,
            loss_N=loss_N,
            num_tokens_N=num_tokens_N,
            generation={},
            facts=variant_facts(variant),
        )

    def counts(self) -> dict[str, Any]:
        return {"num_references_that_rouge_cannot_score": 0}

    def notes(self, ctx: StageContext) -> list[str]:
        intervals = f" {INTERVAL_LEVEL:.0%} bootstrap intervals over rows: `rouge.json`." * bool(
            ctx.config.evaluate.bootstrap_samples
        )
        longest, precision = int(self.tokens.lengths.max()), ctx.config.engine.precision
        return [
            f"{len(self.examples)} rows of at most {longest:,} tokens, each read by itself, {self.num_seen_in_train()} "
            f"of them the same as in train, {precision}. Loss (nats) and perplexity: per token, each row's first one "
            f"aside.{intervals} KL (nats): of the distilled from the softmax attention, after stage one. Train: "
            "minutes of distill + finetune; memory: the peak of one process."
        ]
