"""Stage three: every variant summarizes the test split; ROUGE, loss on the references, one table.

    for each variant:  load → generate, batch by batch → loss on the references, batch by batch   (all ranks)
    then:              rouge.json, results.md, the table                                          (rank 0)

Rows are written as they are made, so a killed evaluation goes on at the example where it stopped. A batch is always
computed whole, and batches depend on the prompts' lengths only: the rows that a resumed run adds are those that an
uninterrupted run writes. A shard (`0/4`: every fourth batch) makes its rows in a folder of its own and reports nothing;
the stage itself takes the shards' rows over, makes what is missing, and reports.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..pipeline.bootstrap import INTERVAL_LEVEL
from ..pipeline.data.tokenize import choose_pad_id, load_prepared_tokenizer
from ..pipeline.data.tokens import TokenizedSplit
from ..pipeline.errors import CheckpointError, ConfigError, DataError, ModelError
from ..pipeline.generation import (
    check_room,
    generate_summaries,
    length_sorted_batches,
    make_generation_config,
    reference_losses,
)
from ..pipeline.interrupts import stop_if_asked, stopping_together
from ..pipeline.manifest import read_manifest
from ..pipeline.rouge import SENTENCE_RULE, UNSCORABLE, num_unscorable, score_rouge
from ..pipeline.row_log import RowLog, read_complete_rows
from ..pipeline.run_folder import atomic_write, check_shard, write_json
from ..pipeline.score_report import VariantScores, summarize_scores
from ..pipeline.score_table import comparison_lines, markdown_report, table_columns, table_rows
from ..pipeline.stage_context import StageContext, StageResult, VariantInputs
from ..pipeline.variants import load_variant_model, softmax_reference

if TYPE_CHECKING:
    from transformers import GenerationConfig

CONSUMES = ("prepare", "distill", "finetune")
SECTIONS = ("evaluate", "model", "variants", "engine.precision", "seed")
IGNORED = frozenset({"evaluate.batch_size", "model.chunk_size", "model.attention_backend"})

_SAMPLE_MAX_CHARACTERS = 700
_SAVED = "the rows made so far are kept"


@dataclass(frozen=True)
class _TestSplit:
    """The test rows as text and as tokens, in the same order."""

    examples: list[dict[str, Any]]
    tokens: TokenizedSplit
    prompt_batches: list[list[int]]
    reference_batches: list[list[int]]
    is_text: bool = False
    """Running text: there is nothing to generate, and no text beside the tokens."""

    def prompt(self, index: int) -> torch.Tensor:
        input_ids, prompt_length = self.tokens[index]
        return input_ids[:prompt_length]


@dataclass(frozen=True)
class _Generation:
    """How summaries are generated. Only made where rows are missing: the join of finished shards loads no tokenizer."""

    tokenizer: Any
    config: GenerationConfig


def run(ctx: StageContext) -> StageResult:
    """Score `main` and every variant, or only make the rows of a shard.

    Raises:
        DataError: there are no test rows.
        ConfigError: `evaluate.max_new_tokens` asks for positions that the base does not have.
        ModelError, CheckpointError: a variant cannot be loaded, or gives NaN; a shard is of another config or input.
        Interrupted: a signal came; the rows of every finished batch are kept.
    """
    test = _open_test_split(ctx)
    if ctx.shard is None and ctx.world.is_main:
        _take_over_shards(ctx)
    for number, variant in enumerate(ctx.variants.values()):
        _run_variant(ctx, variant, test, number)
    if not ctx.world.is_main:
        return StageResult()
    if ctx.shard is not None:
        return _shard_result(ctx)
    return _report(ctx, test)


def _take_over_shards(ctx: StageContext) -> None:
    """Put the rows that shards made among this stage's own; a batch is the same rows in a shard as in one job."""
    folders = ctx.run_folder.shards()
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        if manifest.fingerprint != ctx.fingerprint:
            raise CheckpointError(
                f"{folder}: this shard was evaluated with another config or other inputs; remove it, or do it again "
                f"with --shard {folder.name.removeprefix('shard-').replace('-of-', '/')} --force."
            )
        if manifest.status != "done":
            ctx.reporter.warning(f"{folder} is not finished: the rows that it lacks are made here")
    for variant in ctx.variants:
        for file in (_predictions_file(ctx, variant), _losses_file(ctx, variant)):
            relative = file.relative_to(ctx.folder)
            parts = [read_complete_rows(folder / relative) for folder in folders]
            if any(parts):
                rows = {row["index"]: row for part in (read_complete_rows(file), *parts) for row in part}
                file.parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(rows[index], ensure_ascii=False) + "\n" for index in sorted(rows)]
                atomic_write(file, "".join(lines))


def _shard_result(ctx: StageContext) -> StageResult:
    """The rows are the artifact; scores need those of all shards."""
    is_text = ctx.inputs["prepare"].summary.get("kind") == "text"
    rows_file, what = (_losses_file, "losses") if is_text else (_predictions_file, "summaries")
    num_rows = {name: len(read_complete_rows(rows_file(ctx, name))) for name in ctx.variants}
    ctx.reporter.info(f"shard {ctx.shard}: {', '.join(f'{n} {what} of {name}' for name, n in num_rows.items())}")
    artifacts = {} if is_text else {"predictions": "predictions"}
    if ctx.config.evaluate.perplexity:
        artifacts["reference_losses"] = "reference_losses"
    return StageResult(artifacts=artifacts, summary={"shard": ctx.shard, "num_rows": num_rows})


def _open_test_split(ctx: StageContext) -> _TestSplit:
    prepare, settings = ctx.inputs["prepare"], ctx.config.evaluate
    tokens = TokenizedSplit.open(prepare.artifact("tokens_test"))
    is_text = prepare.summary.get("kind") == "text"
    if is_text:
        if not settings.perplexity:
            raise ConfigError("evaluate.perplexity: false leaves nothing to measure on running text; set it to true.")
        examples = [{"id": f"row-{number}", "seen_in_train": False} for number in range(len(tokens))]
        batches = length_sorted_batches(tokens.lengths.tolist(), settings.batch_size)
        return _TestSplit(examples, tokens, prompt_batches=[], reference_batches=batches, is_text=True)
    with open(prepare.artifact("examples_test"), encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    if not examples:
        raise DataError("the test split has no rows: give data.test_file rows that fit data.max_length_tokens")
    check_room(
        prepare.summary.get("num_positions"),
        int(tokens.prompt_lengths.max()),
        settings.max_new_tokens,
        "the longest test prompt",
        "a lower data.max_length_tokens",
    )
    assert len(examples) == len(tokens), "prepare writes examples and tokens in the same order"
    return _TestSplit(
        examples=examples,
        tokens=tokens,
        prompt_batches=length_sorted_batches(tokens.prompt_lengths.tolist(), settings.batch_size),
        reference_batches=length_sorted_batches(tokens.lengths.tolist(), settings.batch_size),
    )


def _load_generation(ctx: StageContext) -> _Generation:
    tokenizer = load_prepared_tokenizer(ctx.inputs["prepare"], ctx.config.model, ctx.reporter.warning)
    pad_id, _ = choose_pad_id(tokenizer)
    ids = {"bos_id": tokenizer.bos_token_id, "eos_id": tokenizer.eos_token_id, "pad_id": pad_id}
    return _Generation(tokenizer, make_generation_config(ctx.config.evaluate, **ids))


def _predictions_file(ctx: StageContext, variant: str) -> Path:
    return ctx.folder / "predictions" / f"{variant}.jsonl"


def _losses_file(ctx: StageContext, variant: str) -> Path:
    return ctx.folder / "reference_losses" / f"{variant}.jsonl"


def _run_variant(ctx: StageContext, variant: VariantInputs, test: _TestSplit, number: int) -> None:
    """Generate and measure whatever of this variant is missing. `number` counts variants, for the progress."""
    with (
        RowLog(_predictions_file(ctx, variant.name), ctx.world) as predictions,
        RowLog(_losses_file(ctx, variant.name), ctx.world) as losses,
        stopping_together(ctx.world),  # no rank waits for another before the end of its own batches
    ):
        to_generate = _unfinished(ctx, test.prompt_batches, predictions.done)
        to_measure = _unfinished(ctx, test.reference_batches, losses.done) if ctx.config.evaluate.perplexity else []
        if not to_generate and not to_measure:
            all_rows = f"all {len(test.examples)}" if ctx.shard is None else "this shard's"
            what = "losses" if test.is_text else "summaries"
            ctx.reporter.info(f"{variant.label}: {all_rows} {what} are there already")
            return
        num_done = len((losses if test.is_text else predictions).done)
        done = f", {num_done} done already" if num_done else ""
        of_shard = f"shard {ctx.shard} of " if ctx.shard else ""
        doing = f"reads {of_shard}{len(test.examples)} rows of text" if test.is_text else ""
        doing = doing or f"summarizes {of_shard}{len(test.examples)} dialogues"
        ctx.reporter.info(f"{variant.label}: {doing}{done}")
        generation = _load_generation(ctx)
        model = load_variant_model(
            variant.config, variant.inputs, ctx.world.device, ctx.config.engine.precision, ctx.reporter.info
        )
        batches_per_variant = len(test.prompt_batches) + len(test.reference_batches)
        progress = _Progress(ctx, first=number * batches_per_variant, total=len(ctx.variants) * batches_per_variant)

        for position in _share(to_generate, ctx):
            stop_if_asked(_SAVED)
            batch = test.prompt_batches[position]
            rows = _generate_rows(model, test, generation, batch)
            predictions.append([row for row in rows if row["index"] not in predictions.done])
            num_new = sum(row["num_tokens"] for row in rows)
            progress.step(position, num_new, {"new_tokens_per_summary": num_new / len(rows)})

        # Over what was there and what this process measures: alone it ends at the table's loss. fsum: an attempt that
        # was killed and resumed shows the same numbers, whatever was measured when.
        rows = read_complete_rows(_losses_file(ctx, variant.name)) if to_measure else []
        known = {row["index"]: (row["loss_nats"], row["num_tokens"]) for row in rows if row["index"] in losses.done}
        for position in _share(to_measure, ctx):
            stop_if_asked(_SAVED)
            batch = test.reference_batches[position]
            measured = reference_losses(model, [test.tokens[index] for index in batch], generation.config.pad_token_id)
            losses.append(
                [
                    {"index": index, "loss_nats": loss, "num_tokens": num_tokens}
                    for index, (loss, num_tokens) in zip(batch, measured, strict=True)
                    if index not in losses.done
                ]
            )
            num_targets = sum(num_tokens for _, num_tokens in measured)
            known |= zip(batch, measured, strict=True)
            mean_nats = math.fsum(loss for loss, _ in known.values()) / sum(num for _, num in known.values())
            progress.step(len(test.prompt_batches) + position, num_targets, {"loss_nats": mean_nats})
    del model
    gc.collect()
    if ctx.world.device.type == "cuda":
        torch.cuda.empty_cache()


def _unfinished(ctx: StageContext, batches: list[list[int]], done: frozenset[int]) -> list[int]:
    """Positions of the batches with a row that is not done; of a shard's batches only, where this is one."""
    index, num_shards = check_shard(ctx.shard) if ctx.shard is not None else (0, 1)
    return [
        position
        for position, batch in enumerate(batches)
        if position % num_shards == index and not done.issuperset(batch)
    ]


def _share(positions: list[int], ctx: StageContext) -> Iterator[int]:
    """This rank's part: every world_size-th of the unfinished batches, whoever made the finished ones."""
    yield from positions[ctx.world.rank :: ctx.world.world_size]


@dataclass
class _Progress:
    """Counts batches over all variants, so that the time that remains is that of the whole stage."""

    ctx: StageContext
    first: int
    total: int
    started: bool = False

    def step(self, position: int, tokens: int, metrics: dict[str, float]) -> None:
        step = self.first + position + 1
        if not self.started:
            self.ctx.reporter.rewind(step - 1)
            self.started = True
        self.ctx.reporter.step(step, self.total, tokens=tokens * self.ctx.world.world_size, metrics=metrics)


def _generate_rows(model: Any, test: _TestSplit, generation: _Generation, batch: list[int]) -> list[dict[str, Any]]:
    summaries = generate_summaries(model, [test.prompt(index) for index in batch], generation.config)
    rows = []
    for index, summary in zip(batch, summaries, strict=True):
        example = test.examples[index]
        rows.append(
            {
                "index": index,
                "id": example["id"],
                "prediction": generation.tokenizer.decode(summary.token_ids, skip_special_tokens=True).strip(),
                "reference": example["summary"],
                "seen_in_train": example["seen_in_train"],
                "num_tokens": len(summary.token_ids),
                "truncated": summary.truncated,
            }
        )
    return rows


def _report(ctx: StageContext, test: _TestSplit) -> StageResult:
    """Score what all ranks wrote; write rouge.json and results.md; show the table and a sample."""
    settings = ctx.config.evaluate
    scores = {name: _score(ctx, variant, test) for name, variant in ctx.variants.items()}
    reference = softmax_reference({name: variant.config for name, variant in ctx.variants.items()})
    seen_N = torch.tensor([bool(example["seen_in_train"]) for example in test.examples])
    unscorable = 0 if test.is_text else num_unscorable(example["summary"] for example in test.examples)
    figures = summarize_scores(
        scores,
        seen_in_train_N=seen_N,
        reference=reference,
        bootstrap_samples=settings.bootstrap_samples,
        generators={subset: ctx.rng(f"evaluate/bootstrap/{subset}") for subset in ("all", "unseen")},
    )
    write_json(
        ctx.folder / "rouge.json",
        {
            "kind": "text" if test.is_text else "dialogues",
            "settings": {
                **({} if test.is_text else _how_generated(ctx)),
                "intervals": {
                    "kind": "percentile bootstrap over examples, paired between variants",
                    "level": INTERVAL_LEVEL,
                    "samples": settings.bootstrap_samples,
                    "seed": ctx.config.seed,
                },
                "precision": ctx.config.engine.precision,
            },
            "num_examples": len(test.examples),
            "num_examples_seen_in_train": int(seen_N.sum()),
            "num_references_that_rouge_cannot_score": unscorable,
            "softmax_reference": reference,
            "variants": figures,
        },
    )
    training = {name: _training_facts(variant) for name, variant in ctx.variants.items()}
    rows, comparisons = table_rows(figures, training), comparison_lines(figures, reference)
    title = f"{ctx.config.name}: {len(test.examples)} test {'rows of text' if test.is_text else 'dialogues'}"
    columns, narrow = table_columns(figures)
    notes = _notes_on_text(ctx, test) if test.is_text else _notes(ctx, test, seen_N, unscorable)
    atomic_write(ctx.folder / "results.md", markdown_report(title, columns, rows, comparisons, notes))

    ctx.reporter.table(title, columns, rows, narrow=narrow)
    for line in comparisons:
        ctx.reporter.info(line)
    for name, variant in figures.items():
        if variant["generation"] and variant["generation"]["num_truncated"]:
            ctx.reporter.warning(
                f"{ctx.variants[name].label}: {variant['generation']['num_truncated']} of {len(test.examples)} "
                f"summaries were cut at evaluate.max_new_tokens={settings.max_new_tokens}"
            )
    if unscorable:
        ctx.reporter.warning(f"{unscorable} of {len(test.examples)} references {UNSCORABLE}. Compare the losses")
    files, artifacts = {"scores": "rouge.json", "table": "results.md"}, {"rouge": "rouge.json"}
    if not test.is_text:
        _show_sample(ctx, test)
        files["summaries"] = artifacts["predictions"] = "predictions"
    for what, name in files.items():
        ctx.reporter.info(f"{what:<9} {ctx.folder / name}")
    return StageResult(
        artifacts=artifacts,
        summary={
            "num_examples": len(test.examples),
            "softmax_reference": reference,
            "variants": {name: _headline(variant) for name, variant in figures.items()},
            "training": training,
            "results": "results.md",
        },
    )


def _how_generated(ctx: StageContext) -> dict[str, Any]:
    """How summaries were made and scored, for rouge.json."""
    keys = ("max_new_tokens", "min_new_tokens", "num_beams", "no_repeat_ngram_size")
    return {
        "metric": "rouge-score, F1 in points (x 100), Porter stemming",
        "sentences_of_rougeLsum": SENTENCE_RULE,
        "generation": {key: getattr(ctx.config.evaluate, key) for key in keys},
        "prompt_template": ctx.config.data.prompt_template,
    }


def _score(ctx: StageContext, variant: VariantInputs, test: _TestSplit) -> VariantScores:
    predictions = read_complete_rows(_predictions_file(ctx, variant.name))
    loss_N = num_tokens_N = None
    if ctx.config.evaluate.perplexity:
        losses = read_complete_rows(_losses_file(ctx, variant.name))
        loss_N = torch.tensor([row["loss_nats"] for row in losses], dtype=torch.float64)
        num_tokens_N = torch.tensor([row["num_tokens"] for row in losses])
        bad = [row["index"] for row in losses if not math.isfinite(row["loss_nats"])]
        if bad:
            raise ModelError(
                f"{variant.label}: the loss of {len(bad)} test rows is not finite (first: row {bad[0]}); the "
                "model's weights or feature maps hold NaN or overflow: look at its distill and finetune metrics"
            )
    model = variant.config.model
    linear = model.attention == "linear"
    return VariantScores(
        label=variant.label,
        rouge=None
        if test.is_text
        else score_rouge([row["prediction"] for row in predictions], [row["reference"] for row in predictions]),
        loss_N=loss_N,
        num_tokens_N=num_tokens_N,
        generation={}
        if test.is_text
        else {
            "num_truncated": sum(row["truncated"] for row in predictions),
            "num_empty": sum(not row["prediction"] for row in predictions),
            "mean_new_tokens": sum(row["num_tokens"] for row in predictions) / len(predictions),
        },
        facts={
            "attention": model.attention,
            "feature_map": model.feature_map if linear else None,
            "finetuned": not variant.inputs["finetune"].skipped,
            "kl_mean_nats": variant.inputs["distill"].summary.get("kl_mean") if linear else None,
        },
    )


def _training_facts(variant: VariantInputs) -> dict[str, float | int | None]:
    """Minutes of distill and finetune together, and the larger of their memory peaks; of merged layers all parts'."""
    trained = [variant.inputs[stage].manifest for stage in ("distill", "finetune") if not variant.inputs[stage].skipped]
    if not trained:
        return {"minutes": None, "peak_memory_bytes": None}
    seconds = [manifest.duration_s + manifest.summary.get("parts_duration_s", 0) for manifest in trained]
    peaks = [
        max(manifest.peak_memory_bytes, manifest.summary.get("parts_peak_memory_bytes", 0)) for manifest in trained
    ]
    return {"minutes": sum(seconds) / 60, "peak_memory_bytes": max(peaks)}


def _headline(variant: dict[str, Any]) -> dict[str, Any]:
    scores = variant["all"]
    keys = ("rouge1", "rouge2", "rougeL", "rougeLsum", "rouge1_ratio", "loss_nats_per_token", "perplexity")
    return {"label": variant["label"], **{key: scores[key]["value"] for key in keys if scores.get(key) is not None}}


def _notes(ctx: StageContext, test: _TestSplit, seen_N: torch.Tensor, unscorable: int) -> list[str]:
    settings = ctx.config.evaluate
    search = "greedy" if settings.num_beams == 1 else f"{settings.num_beams} beams"
    unseen_by_rouge = [f"{unscorable} of the references {UNSCORABLE}."] if unscorable else []
    intervals = f", ± half of the {INTERVAL_LEVEL:.0%} bootstrap interval" if settings.bootstrap_samples else ""
    return [
        f"{len(test.examples)} test dialogues, {int(seen_N.sum())} of which stand word for word in train (`rouge.json` "
        f"also has the scores without them). {search}, at most {settings.max_new_tokens} new tokens, "
        f"{ctx.config.engine.precision}.",
        f"ROUGE: F1 x 100 with stemming{intervals}. Loss (nats) and perplexity: per token of the reference "
        "summaries, end token included. KL (nats): of the distilled from the softmax attention, after stage one. "
        "Train: minutes of distill + finetune; memory: the peak of one process.",
        *unseen_by_rouge,
    ]


def _notes_on_text(ctx: StageContext, test: _TestSplit) -> list[str]:
    intervals = f" {INTERVAL_LEVEL:.0%} bootstrap intervals over rows: `rouge.json`." * bool(
        ctx.config.evaluate.bootstrap_samples
    )
    return [
        f"{len(test.examples)} rows of at most {int(test.tokens.lengths.max()):,} tokens, each read by itself, "
        f"{ctx.config.engine.precision}. Loss (nats) and perplexity: per token, each row's first one aside.{intervals} "
        "KL (nats): of the distilled from the softmax attention, after stage one. Train: minutes of distill + "
        "finetune; memory: the peak of one process."
    ]


def _show_sample(ctx: StageContext, test: _TestSplit) -> None:
    """The first short dialogue that is not in train, its reference and every variant's summary."""
    index = next(
        (
            number
            for number, example in enumerate(test.examples)
            if not example["seen_in_train"] and len(example["dialogue"]) <= _SAMPLE_MAX_CHARACTERS
        ),
        0,
    )
    example = test.examples[index]
    lines = [f"sample {example['id']}:", *(f"    {line}" for line in example["dialogue"].splitlines())]
    lines.append(f"  reference: {_one_line(example['summary'])}")
    for name, variant in ctx.variants.items():
        row = read_complete_rows(_predictions_file(ctx, name))[index]
        lines.append(f"  {variant.label}: {_one_line(row['prediction']) or '(nothing)'}")
    ctx.reporter.info("\n".join(lines))


def _one_line(text: str) -> str:
    return " ".join(text.split())
