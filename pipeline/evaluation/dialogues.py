"""Dialogues: every variant summarizes them and reads the reference summaries; ROUGE, loss and perplexity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..bootstrap import INTERVAL_LEVEL
from ..data.tokenize import choose_pad_id, load_prepared_tokenizer
from ..data.tokens import TokenizedSplit
from ..generation import check_room, generate_summaries, length_sorted_batches, make_generation_config
from ..rouge import SENTENCE_RULE, UNSCORABLE, num_unscorable, score_rouge
from ..score_report import VariantScores
from ..stage_context import StageContext, VariantInputs
from .losses import LossPass, token_losses
from .task import Made, Pass, Row, Task, read_examples, variant_facts

if TYPE_CHECKING:
    from transformers import GenerationConfig

_SAMPLE_MAX_CHARACTERS = 700


@dataclass(frozen=True)
class Generation:
    """How summaries are generated."""

    tokenizer: Any
    config: GenerationConfig


def load_generation(ctx: StageContext) -> Generation:
    """The tokenizer that prepare used, and the settings of the config."""
    tokenizer = load_prepared_tokenizer(ctx.inputs["prepare"], ctx.config.model, ctx.reporter.warning)
    pad_id, _ = choose_pad_id(tokenizer)
    ids = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id, "pad_id": pad_id}
    return Generation(tokenizer, make_generation_config(ctx.config.evaluate, **ids))


@dataclass(frozen=True)
class SummaryPass(Pass):
    """Rows {index, id, prediction, reference, seen_in_train, num_tokens, truncated}: each dialogue's summary."""

    folder: ClassVar[str] = "predictions"
    examples: list[Row]
    tokens: TokenizedSplit
    batches: list[list[int]]
    is_wanted: bool = True

    def start(self, model: torch.nn.Module, tools: Generation, known: Sequence[Row]) -> Callable[[list[int]], Made]:
        def summarize(batch: list[int]) -> Made:
            summaries = generate_summaries(model, [self._prompt(index) for index in batch], tools.config)
            rows = []
            for index, summary in zip(batch, summaries, strict=True):
                example = self.examples[index]
                rows.append(
                    {
                        "index": index,
                        "id": example["id"],
                        "prediction": tools.tokenizer.decode(summary.token_ids, skip_special_tokens=True).strip(),
                        "reference": example["summary"],
                        "seen_in_train": example["seen_in_train"],
                        "num_tokens": len(summary.token_ids),
                        "truncated": summary.truncated,
                    }
                )
            num_new = sum(row["num_tokens"] for row in rows)
            return Made(rows, num_new, {"new_tokens_per_summary": num_new / len(rows)})

        return summarize

    def _prompt(self, index: int) -> torch.Tensor:
        input_ids, prompt_length = self.tokens[index]
        return input_ids[:prompt_length]


class DialogueTask(Task):
    """Test rows of a dialogue and its summary."""

    kind = "dialogues"
    rows_are = "dialogues"
    verb = "summarizes"
    made = "summaries"

    def __init__(self, ctx: StageContext, tokens: TokenizedSplit) -> None:
        """
        Raises:
            DataError: there are no test rows.
            ConfigError: `evaluate.max_new_tokens` asks for positions that the base does not have.
        """
        prepare, settings = ctx.inputs["prepare"], ctx.config.evaluate
        self.examples, self.tokens = read_examples(prepare, tokens), tokens
        check_room(
            prepare.summary.get("num_positions"),
            int(tokens.prompt_lengths.max()),
            settings.max_new_tokens,
            "the longest test prompt",
            "a lower data.max_length_tokens",
        )
        prompts = length_sorted_batches(tokens.prompt_lengths.tolist(), settings.batch_size)
        whole = length_sorted_batches(tokens.lengths.tolist(), settings.batch_size)
        self.passes = (
            SummaryPass(self.examples, tokens, prompts),
            LossPass(tokens, whole, is_wanted=settings.perplexity),
        )
        self._num_unscorable = num_unscorable(example["summary"] for example in self.examples)

    def load_tools(self, ctx: StageContext) -> Generation:
        return load_generation(ctx)

    def score(self, ctx: StageContext, variant: VariantInputs, rows: Mapping[str, list[Row]]) -> VariantScores:
        predictions = rows[SummaryPass.folder]
        loss_N, num_tokens_N = token_losses(variant, rows.get(LossPass.folder))
        return VariantScores(
            label=variant.label,
            rouge=score_rouge([row["prediction"] for row in predictions], [row["reference"] for row in predictions]),
            loss_N=loss_N,
            num_tokens_N=num_tokens_N,
            generation={
                "num_truncated": sum(row["truncated"] for row in predictions),
                "num_empty": sum(not row["prediction"] for row in predictions),
                "mean_new_tokens": sum(row["num_tokens"] for row in predictions) / len(predictions),
            },
            facts=variant_facts(variant),
        )

    def settings(self, ctx: StageContext) -> dict[str, Any]:
        keys = ("max_new_tokens", "min_new_tokens", "num_beams", "no_repeat_ngram_size")
        return {
            "metric": "rouge-score, F1 in points (x 100), Porter stemming",
            "sentences_of_rougeLsum": SENTENCE_RULE,
            "generation": {key: getattr(ctx.config.evaluate, key) for key in keys},
            "prompt_template": ctx.config.data.prompt_template,
        }

    def counts(self) -> dict[str, Any]:
        return {"num_references_that_rouge_cannot_score": self._num_unscorable}

    def notes(self, ctx: StageContext) -> list[str]:
        settings = ctx.config.evaluate
        search = "greedy" if settings.num_beams == 1 else f"{settings.num_beams} beams"
        unseen_by_rouge = [f"{self._num_unscorable} of the references {UNSCORABLE}."] * bool(self._num_unscorable)
        intervals = f", ± half of the {INTERVAL_LEVEL:.0%} bootstrap interval" if settings.bootstrap_samples else ""
        return [
            f"{len(self.examples)} test dialogues, {self.num_seen_in_train()} of which stand word for word in train "
            f"(`rouge.json` also has the scores without them). {search}, at most {settings.max_new_tokens} new tokens, "
            f"{ctx.config.engine.precision}.",
            f"ROUGE: F1 x 100 with stemming{intervals}. Loss (nats) and perplexity: per token of the reference "
            "summaries, end token included. KL (nats): of the distilled from the softmax attention, after stage one. "
            "Train: minutes of distill + finetune; memory: the peak of one process.",
            *unseen_by_rouge,
        ]

    def results(self) -> dict[str, str]:
        return {"summaries": SummaryPass.folder}

    def warnings(self, ctx: StageContext, figures: Mapping[str, Any]) -> list[str]:
        num, limit = len(self.examples), ctx.config.evaluate.max_new_tokens
        cut = {name: variant["generation"]["num_truncated"] for name, variant in figures.items()}
        said = [
            f"{ctx.variants[name].label}: {num_cut} of {num} summaries were cut at evaluate.max_new_tokens={limit}"
            for name, num_cut in cut.items()
            if num_cut
        ]
        if self._num_unscorable:
            said.append(f"{self._num_unscorable} of {num} references {UNSCORABLE}. Compare the losses")
        return said

    def sample(self, ctx: StageContext, rows: Mapping[str, list[Row]]) -> str:
        """The first short dialogue that is not in train, its reference and every variant's summary."""
        index = next(
            (
                number
                for number, example in enumerate(self.examples)
                if not example["seen_in_train"] and len(example["dialogue"]) <= _SAMPLE_MAX_CHARACTERS
            ),
            0,
        )
        example = self.examples[index]
        lines = [f"sample {example['id']}:", *(f"    {line}" for line in example["dialogue"].splitlines())]
        lines.append(f"  reference: {_one_line(example['summary'])}")
        for name, variant in ctx.variants.items():
            lines.append(f"  {variant.label}: {_one_line(rows[name][index]['prediction']) or '(nothing)'}")
        return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
