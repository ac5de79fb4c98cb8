"""Stage three: every variant is scored on the test split: what it makes of each row, its loss, one table.

    for each variant:  load → the rows of each pass, batch by batch   (all ranks)
    then:              rouge.json, results.md, the table              (rank 0)

What a pass makes, and how it is scored and told of, depends on the rows: `pipeline/evaluation/` has a task for
dialogues (summaries and ROUGE, loss on the references), for running text (loss), for rows to classify and to score.

Rows are written as they are made, so a killed evaluation goes on at the example where it stopped. A batch is always
computed whole, and batches depend on the rows' lengths only: the rows that a resumed run adds are those that an
uninterrupted run writes. A shard (`0/4`: every fourth batch) makes its rows in a folder of its own and reports nothing;
the stage itself takes the shards' rows over, makes what is missing, and reports.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from ..pipeline.bootstrap import INTERVAL_LEVEL
from ..pipeline.errors import CheckpointError
from ..pipeline.evaluation.opening import open_task
from ..pipeline.evaluation.task import Pass, Row, Task, rows_file
from ..pipeline.interrupts import stop_if_asked, stopping_together
from ..pipeline.manifest import read_manifest
from ..pipeline.row_log import RowLog, read_complete_rows
from ..pipeline.run_folder import atomic_write, check_shard, write_json
from ..pipeline.score_report import summarize_scores
from ..pipeline.score_table import comparison_lines, markdown_report, table_columns, table_rows
from ..pipeline.stage_context import StageContext, StageResult, VariantInputs
from ..pipeline.variants import load_variant_model, softmax_reference

CONSUMES = ("prepare", "distill", "finetune")
SECTIONS = ("evaluate", "model", "variants", "engine.precision", "seed")
IGNORED = frozenset({"evaluate.batch_size", "model.chunk_size", "model.attention_backend"})

_SAVED = "the rows made so far are kept"


def run(ctx: StageContext) -> StageResult:
    """Score `main` and every variant, or only make the rows of a shard.

    Raises:
        DataError: there are no test rows.
        ConfigError: the config leaves nothing to measure, or asks for positions that the base does not have.
        ModelError, CheckpointError: a variant cannot be loaded, or gives NaN; a shard is of another config or input.
        Interrupted: a signal came; the rows of every finished batch are kept.
    """
    task = open_task(ctx)
    if ctx.shard is None and ctx.world.is_main:
        _take_over_shards(ctx, task)
    for number, variant in enumerate(ctx.variants.values()):
        _run_variant(ctx, variant, task, number)
    if not ctx.world.is_main:
        return StageResult()
    if ctx.shard is not None:
        return _shard_result(ctx, task)
    return _report(ctx, task)


def _take_over_shards(ctx: StageContext, task: Task) -> None:
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
        for one in task.passes:
            file = rows_file(ctx, one.folder, variant)
            relative = file.relative_to(ctx.folder)
            parts = [read_complete_rows(folder / relative) for folder in folders]
            if any(parts):
                rows = {row["index"]: row for part in (read_complete_rows(file), *parts) for row in part}
                file.parent.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(rows[index], ensure_ascii=False) + "\n" for index in sorted(rows)]
                atomic_write(file, "".join(lines))


def _shard_result(ctx: StageContext, task: Task) -> StageResult:
    """The rows are the artifact; scores need those of all shards."""
    num_rows = {name: len(_rows_of(ctx, task.passes[0], name)) for name in ctx.variants}
    ctx.reporter.info(f"shard {ctx.shard}: {', '.join(f'{n} {task.made} of {name}' for name, n in num_rows.items())}")
    return StageResult(
        artifacts={one.folder: one.folder for one in task.passes if one.is_wanted},
        summary={"shard": ctx.shard, "num_rows": num_rows},
    )


def _rows_of(ctx: StageContext, one: Pass, variant: str) -> list[Row]:
    return read_complete_rows(rows_file(ctx, one.folder, variant))


def _run_variant(ctx: StageContext, variant: VariantInputs, task: Task, number: int) -> None:
    """Make whatever of this variant is missing. `number` counts variants, for the progress."""
    with ExitStack() as stack:
        logs = [stack.enter_context(RowLog(rows_file(ctx, one.folder, variant.name), ctx.world)) for one in task.passes]
        stack.enter_context(stopping_together(ctx.world))  # no rank waits for another before the end of its own batches
        missing = [_unfinished(ctx, one, log.done) for one, log in zip(task.passes, logs, strict=True)]
        if not any(missing):
            all_rows = f"all {len(task.examples)}" if ctx.shard is None else "this shard's"
            ctx.reporter.info(f"{variant.label}: {all_rows} {task.made} are there already")
            return
        done = f", {len(logs[0].done)} done already" if logs[0].done else ""
        of_shard = f"shard {ctx.shard} of " if ctx.shard else ""
        ctx.reporter.info(f"{variant.label}: {task.verb} {of_shard}{len(task.examples)} {task.rows_are}{done}")
        tools = task.load_tools(ctx)
        model = load_variant_model(
            variant.config, variant.inputs, ctx.world.device, ctx.config.engine.precision, ctx.reporter.info
        )
        per_variant = sum(len(one.batches) for one in task.passes)
        progress = _Progress(ctx, first=number * per_variant, total=len(ctx.variants) * per_variant)
        num_before = 0
        for one, log, positions in zip(task.passes, logs, missing, strict=True):
            if positions:
                known = [row for row in _rows_of(ctx, one, variant.name) if row["index"] in log.done]
                make = one.start(model, tools, known)
                for position in _share(positions, ctx):
                    stop_if_asked(_SAVED)
                    made = make(one.batches[position])
                    log.append([row for row in made.rows if row["index"] not in log.done])
                    progress.step(num_before + position, made.num_tokens, made.metrics)
            num_before += len(one.batches)
    del model
    gc.collect()
    if ctx.world.device.type == "cuda":
        torch.cuda.empty_cache()


def _unfinished(ctx: StageContext, one: Pass, done: frozenset[int]) -> list[int]:
    """Positions of the batches with a row that is not done; of a shard's batches only, where this is one."""
    if not one.is_wanted:
        return []
    index, num_shards = check_shard(ctx.shard) if ctx.shard is not None else (0, 1)
    return [
        position
        for position, batch in enumerate(one.batches)
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


def _report(ctx: StageContext, task: Task) -> StageResult:
    """Score what all ranks wrote; write rouge.json and results.md; show the table and a sample."""
    settings, num_examples = ctx.config.evaluate, len(task.examples)
    rows = {
        name: {one.folder: _rows_of(ctx, one, name) for one in task.passes if one.is_wanted} for name in ctx.variants
    }
    reference = softmax_reference({name: variant.config for name, variant in ctx.variants.items()})
    figures = summarize_scores(
        {name: task.score(ctx, variant, rows[name]) for name, variant in ctx.variants.items()},
        seen_in_train_N=torch.tensor([bool(example["seen_in_train"]) for example in task.examples]),
        reference=reference,
        bootstrap_samples=settings.bootstrap_samples,
        generators={subset: ctx.rng(f"evaluate/bootstrap/{subset}") for subset in ("all", "unseen")},
    )
    write_json(
        ctx.folder / "rouge.json",
        {
            "kind": task.kind,
            "settings": {
                **task.settings(ctx),
                "intervals": {
                    "kind": "percentile bootstrap over examples, paired between variants",
                    "level": INTERVAL_LEVEL,
                    "samples": settings.bootstrap_samples,
                    "seed": ctx.config.seed,
                },
                "precision": ctx.config.engine.precision,
            },
            "num_examples": num_examples,
            "num_examples_seen_in_train": task.num_seen_in_train(),
            **task.counts(),
            "softmax_reference": reference,
            "variants": figures,
        },
    )
    training = {name: _training_facts(variant) for name, variant in ctx.variants.items()}
    table, comparisons = table_rows(figures, training), comparison_lines(figures, reference)
    title = f"{ctx.config.name}: {num_examples} test {task.rows_are}"
    columns, narrow = table_columns(figures)
    atomic_write(ctx.folder / "results.md", markdown_report(title, columns, table, comparisons, task.notes(ctx)))

    ctx.reporter.table(title, columns, table, narrow=narrow)
    for line in comparisons:
        ctx.reporter.info(line)
    for line in task.warnings(ctx, figures):
        ctx.reporter.warning(line)
    sample = task.sample(ctx, {name: rows[name][task.passes[0].folder] for name in ctx.variants})
    if sample is not None:
        ctx.reporter.info(sample)
    for what, name in {"scores": "rouge.json", "table": "results.md", **task.results()}.items():
        ctx.reporter.info(f"{what:<9} {ctx.folder / name}")
    return StageResult(
        artifacts={"rouge": "rouge.json", **{folder: folder for folder in task.results().values()}},
        summary={
            "num_examples": num_examples,
            "softmax_reference": reference,
            "variants": {name: _headline(variant) for name, variant in figures.items()},
            "training": training,
            "results": "results.md",
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


_OF_TEXT = ("rouge1", "rouge2", "rougeL", "rougeLsum", "rouge1_ratio", "loss_nats_per_token", "perplexity")
_OF_CLASSES = ("accuracy", "f1", "mcc", "accuracy_difference", "loss_nats_per_row")
_OF_SCORES = ("pearson", "spearman", "pearson_difference", "mean_squared_error")


def _headline(variant: dict[str, Any]) -> dict[str, Any]:
    scores = variant["all"]
    keys = (key for key in (*_OF_TEXT, *_OF_CLASSES, *_OF_SCORES) if scores.get(key) is not None)
    return {"label": variant["label"], **{key: scores[key]["value"] for key in keys}}
