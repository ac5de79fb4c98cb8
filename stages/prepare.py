"""Stage nought: check or make what the run needs, and tokenize it once.

    base model, tokenizer ──▶ checked          train, validation, test ──▶ tokens_*.safetensors, examples_*.jsonl

For a run with a `tiny` section it first makes corpus, tokenizer and a small pretrained model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..pipeline.base_folder import check_convertible, check_head, kind_fault, pair_fault
from ..pipeline.config import DataConfig, RunConfig
from ..pipeline.data.base_fingerprint import fingerprint_base, fingerprint_local_inputs, fingerprint_tokenizer
from ..pipeline.data.examples import LabelledExample, Split
from ..pipeline.data.labelled_rows import base_names, check_some_classes, number_labels, unnamed_doubt
from ..pipeline.data.scored_rows import OUTPUT_NAMES, check_some_scores, describe_scores
from ..pipeline.data.sources import SPLITS, resolve_splits
from ..pipeline.data.text_rows import describe_counts, read_text_splits
from ..pipeline.data.tokenize import TokenizedExamples, choose_pad_id, load_tokenizer, tokenize_examples
from ..pipeline.data.tokenize_labelled import TokenizedRows, tokenize_rows
from ..pipeline.data.tokenizer_fit import (
    check_rotation,
    check_template,
    check_text_rows,
    check_unknown_tokens,
    check_vocabulary,
)
from ..pipeline.errors import ConfigError, DataError
from ..pipeline.families import family_of_config, shape_from_fields, table_length
from ..pipeline.generation import check_room
from ..pipeline.interrupts import stop_if_asked
from ..pipeline.rouge import UNSCORABLE, num_unscorable
from ..pipeline.run_folder import atomic_write, write_json
from ..pipeline.stage_context import StageContext, StageResult

CONSUMES: tuple[str, ...] = ()
SECTIONS: tuple[str, ...] = (
    "seed",
    "model.base",
    "model.tokenizer",
    "model.revision",
    "model.trust_remote_code",
    "data",
    "tiny",
)
IGNORED: frozenset[str] = frozenset()

_SAVED = "what was made so far is kept or quickly made again"


def external_inputs(config: RunConfig) -> dict[str, str]:
    """Fingerprints of the local files that this stage reads, so that a changed file is noticed."""
    return fingerprint_local_inputs(config.model, config.data)


def run(ctx: StageContext) -> StageResult:
    """Prepare on the first process; the others wait in the runner.

    Raises:
        Interrupted: a signal came. A tiny run's pretraining is saved; the rest is quick to do again.
        ConfigError: no base model and no tiny section, or a base that is not for the kind of data.
        ModelError: the base cannot be converted, or the tokenizer does not fit it.
        DataError: a dataset, file or row cannot be used, or nothing is left of a split.
    """
    return _prepare(ctx) if ctx.world.is_main else StageResult()


def _prepare(ctx: StageContext) -> StageResult:
    # Importing transformers takes seconds, and pipeline.modeling needs it.
    from ..pipeline.modeling.load_base import check_base

    model, data = ctx.config.model, ctx.config.data
    base, artifacts = model.base, {}
    if ctx.config.tiny is not None:
        base, data = _make_tiny_inputs(ctx)
        artifacts["base_model"] = "base_model"
    elif base is None:
        raise ConfigError("model.base: set it to a local folder or hub id of a model (or add a tiny section)")

    stop_if_asked(_SAVED)
    # Everything that can be refused cheaply is refused before the slow work.
    base_config = check_base(base, revision=model.revision)
    fault = kind_fault(family_of_config(base_config), data.kind)
    if fault is not None:
        raise ConfigError(f"data.kind: {fault}")
    fault = pair_fault(shape_from_fields(base_config.to_dict()), data)
    if fault is not None:
        raise ConfigError(f"data.second_text_field: {fault}")
    splits = {} if data.kind == "text" else resolve_splits(data, ctx.rng)
    check_convertible(base, base_config.to_dict(), ctx.config)
    label_names = _number_labels(ctx, splits, base_config) if data.kind == "classification" else None
    if data.kind == "regression":
        label_names = OUTPUT_NAMES
    if label_names is not None:
        check_head(base, family_of_config(base_config), label_names)
    num_positions = table_length(base_config)
    if num_positions is not None and data.max_length_tokens > num_positions:
        raise ConfigError(
            f"data.max_length_tokens: {data.max_length_tokens}, but the base model has {num_positions} positions: give "
            f"at most {num_positions}."
        )
    tokenizer_source = model.tokenizer or base
    tokenizer = load_tokenizer(
        tokenizer_source,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        generates=label_names is None,
    )
    tokenizer_fingerprint = fingerprint_tokenizer(tokenizer)  # before its first use, which sets truncation and padding
    for doubt in check_vocabulary(tokenizer, base_config):
        ctx.reporter.warning(doubt)
    pad_id, pad_reason = choose_pad_id(tokenizer)
    ctx.reporter.info(f"padding with token {pad_id}: {pad_reason}")

    described = {
        "path": base,
        "revision": model.revision,
        "fingerprint": fingerprint_base(base, model.revision, base_config),
        "tokenizer": tokenizer_source,
        "tokenizer_fingerprint": tokenizer_fingerprint,
    }
    write_json(ctx.folder / "base_model.json", described)
    artifacts.setdefault("base_model", "base_model.json")

    if data.kind == "text":
        figures = _write_text(ctx, tokenizer, data, artifacts)
    elif label_names is not None:
        figures = _write_labelled(ctx, tokenizer, data, splits, label_names, artifacts)
    else:
        figures = _write_dialogues(ctx, tokenizer, data, splits, artifacts, num_positions)

    longest_input = getattr(base_config, "max_position_embeddings", None)
    longest_row = max(split["length_max"] for split in figures.values())
    if longest_input is not None and longest_row > longest_input:
        ctx.reporter.warning(
            f"rows of up to {longest_row} tokens, but the base model was made for {longest_input}: "
            "lower data.max_length_tokens"
        )
    doubt = check_rotation(base_config, longest_row)
    if doubt is not None:
        ctx.reporter.warning(doubt)
    summary: dict[str, Any] = {
        "kind": data.kind,
        **({} if label_names is None else {"label_names": label_names}),
        "base_model": base,
        "model_type": base_config.model_type,
        "tokenizer": tokenizer_source,
        "base_fingerprint": described["fingerprint"],
        "tokenizer_fingerprint": described["tokenizer_fingerprint"],
        "pad_id": pad_id,
        "num_positions": num_positions,
        "splits": figures,
    }
    return StageResult(artifacts=artifacts, summary=summary)


def _write_dialogues(
    ctx: StageContext,
    tokenizer: Any,
    data: DataConfig,
    splits: dict[str, Split[Any]],
    artifacts: dict[str, str],
    num_positions: int | None,
) -> dict[str, dict[str, int]]:
    """Write every split and enter it in `artifacts`; returns the counts of each."""
    dialogues = [example.dialogue for example in splits["train"].examples]
    for doubt in (*check_unknown_tokens(tokenizer, dialogues), *check_template(tokenizer, data.prompt_template)):
        ctx.reporter.warning(doubt)
    unscorable = num_unscorable(example.summary for example in splits["test"].examples)
    if unscorable:
        ctx.reporter.warning(f"{unscorable} of {len(splits['test'].examples)} test summaries {UNSCORABLE}")
    figures: dict[str, dict[str, int]] = {}
    for name in SPLITS:
        stop_if_asked(_SAVED)
        tokenized = tokenize_examples(tokenizer, splits[name].examples, data)
        if not tokenized.examples:
            raise DataError(
                f"{splits[name].source}: every {name} row is longer than data.max_length_tokens = "
                f"{data.max_length_tokens}; raise it, or set data.overlong=truncate_dialogue"
            )
        artifacts |= _write_split(ctx.folder, name, tokenized)
        figures[name] = _figures(splits[name], tokenized)
        if name == "test":
            longest_prompt = int(tokenized.split.prompt_lengths.max())
            check_room(
                num_positions,
                longest_prompt,
                ctx.config.evaluate.max_new_tokens,
                "the longest test prompt",
                "a lower data.max_length_tokens",
            )
    _show(ctx, figures, {name: splits[name].source for name in SPLITS}, _TABLE_ROWS)
    return figures


def _number_labels(ctx: StageContext, splits: dict[str, Split[Any]], base_config: Any) -> list[str]:
    """Give every class its number, in the examples too; returns the classes' names."""
    label_names, doubt = number_labels(splits, base_names(base_config))
    for one in (doubt, unnamed_doubt(base_config, splits["train"], label_names)):
        if one is not None:
            ctx.reporter.warning(one)
    return label_names


def _write_labelled(
    ctx: StageContext,
    tokenizer: Any,
    data: DataConfig,
    splits: dict[str, Split[LabelledExample]],
    label_names: list[str],
    artifacts: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Write every split of labelled rows and enter it in `artifacts`; returns the counts of each."""
    texts = [text for example in splits["train"].examples for text in (example.text, example.second_text) if text]
    for doubt in check_unknown_tokens(tokenizer, texts, "texts"):
        ctx.reporter.warning(doubt)
    figures: dict[str, dict[str, Any]] = {}
    for name in SPLITS:
        tokenized = tokenize_rows(tokenizer, splits[name].examples, data)
        if not tokenized.examples:
            raise DataError(
                f"{splits[name].source}: every {name} row is longer than data.max_length_tokens = "
                f"{data.max_length_tokens}; raise it, or set data.overlong=truncate"
            )
        rows = (
            {
                "id": example.id,
                "text": example.text,
                **({} if example.second_text is None else {"second_text": example.second_text}),
                "label": example.label if isinstance(example.label, float) else label_names[int(example.label)],
                "seen_in_train": example.seen_in_train,
            }
            for example in tokenized.examples
        )
        artifacts |= _write_rows(ctx.folder, name, tokenized, rows)
        labels: list[Any] = [example.label for example in tokenized.examples]
        if data.kind == "regression":
            figures[name] = _figures(splits[name], tokenized) | describe_scores(labels)
        else:
            counts = Counter(label_names[label] for label in labels)
            told = {"label_counts": {label: counts[label] for label in label_names}}
            figures[name] = _figures(splits[name], tokenized) | told
    if data.kind == "regression":
        _tell_scores(ctx, figures, splits)
    else:
        _tell_classes(ctx, figures, splits, label_names)
    return figures


def _tell_scores(ctx: StageContext, figures: Mapping[str, Mapping[str, Any]], splits: Mapping[str, Split[Any]]) -> None:
    train, test = figures["train"], figures["test"]
    check_some_scores(splits["train"].source, {train["score_min"], train["score_max"]})
    if test["score_min"] == test["score_max"]:
        ctx.reporter.warning(
            f"every test score is {test['score_min']:g}: nothing correlates with them; evaluate will give 0"
        )
    _show(ctx, figures, {name: splits[name].source for name in SPLITS}, _LABELLED_TABLE_ROWS)
    named = {"score_min": "smallest", "score_mean": "mean", "score_max": "greatest"}
    table = [[title, *(f"{figures[name][key]:.4g}" for name in SPLITS)] for key, title in named.items()]
    ctx.reporter.table("Scores", ["", *SPLITS], table)


def _tell_classes(
    ctx: StageContext,
    figures: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, Split[Any]],
    label_names: list[str],
) -> None:
    lost = [label for label, count in figures["train"]["label_counts"].items() if not count]
    if lost:
        named = ", ".join(lost[:_MOST_LABELS_SHOWN])
        ctx.reporter.warning(f"no training row is left of {named}: held out for validation, dropped or not drawn")
    check_some_classes(splits["train"].source, figures["train"]["label_counts"])
    _show(ctx, figures, {name: splits[name].source for name in SPLITS}, _LABELLED_TABLE_ROWS)
    shown = label_names if len(label_names) <= _MOST_LABELS_SHOWN else label_names[: _MOST_LABELS_SHOWN - 1]
    table = [[label, *(f"{figures[name]['label_counts'][label]:,}" for name in SPLITS)] for label in shown]
    if len(shown) < len(label_names):
        rest = [sum(list(figures[name]["label_counts"].values())[len(shown) :]) for name in SPLITS]
        table.append([f"{len(label_names) - len(shown)} more", *(f"{count:,}" for count in rest)])
    ctx.reporter.table("Rows of each label", ["", *SPLITS], table)


def _write_text(
    ctx: StageContext, tokenizer: Any, data: DataConfig, artifacts: dict[str, str]
) -> dict[str, dict[str, int]]:
    """The same of running text, of which no examples are kept: its rows are tokens."""
    splits = read_text_splits(tokenizer, data, ctx.rng)
    for name, split in splits.items():
        artifacts[f"tokens_{name}"] = f"tokens_{name}.safetensors"
        split.rows.write(ctx.folder / artifacts[f"tokens_{name}"])
    figures = describe_counts(splits)
    for doubt in check_text_rows(tokenizer, splits["train"].rows):
        ctx.reporter.warning(doubt)
    test = figures["test"]
    if test["seen_in_train"]:
        ctx.reporter.warning(f"{test['seen_in_train']} of {test['used']} test rows stand token for token in train")
    _show(ctx, figures, {name: split.source for name, split in splits.items()}, _TEXT_TABLE_ROWS)
    return figures


def _make_tiny_inputs(ctx: StageContext) -> tuple[str, DataConfig]:
    """Base model folder, and a data section that points at the generated files."""
    from ..pipeline.data.tiny import CORPUS_FIELDS, make_base_model, make_corpus

    tiny = ctx.config.tiny
    assert tiny is not None
    files = make_corpus(tiny, ctx.config.seed, ctx.folder / "corpus")
    folder = ctx.folder / "base_model"
    checkpoint = ctx.folder / "checkpoints" / "pretraining.safetensors"
    make_base_model(tiny, ctx.config.seed, folder, checkpoint, ctx.fingerprint, ctx.reporter)
    paths = {f"{split}_file": str(file) for split, file in files.items()}
    fields = CORPUS_FIELDS if ctx.config.data.kind == "classification" else {}
    return str(folder), ctx.config.data.model_copy(update={"dataset": None, **fields, **paths})


def _write_split(folder: Path, name: str, tokenized: TokenizedExamples) -> dict[str, str]:
    rows = (
        {
            "id": example.id,
            "dialogue": example.dialogue,
            "summary": example.summary,
            "prompt": prompt,
            "seen_in_train": example.seen_in_train,
        }
        for example, prompt in zip(tokenized.examples, tokenized.prompts, strict=True)
    )
    return _write_rows(folder, name, tokenized, rows)


def _write_rows(
    folder: Path, name: str, tokenized: TokenizedExamples | TokenizedRows, rows: Iterable[dict[str, Any]]
) -> dict[str, str]:
    """Write tokens and texts of a split, in the same order: artifact name to file name."""
    tokens, examples = f"tokens_{name}.safetensors", f"examples_{name}.jsonl"
    tokenized.split.write(folder / tokens)
    atomic_write(folder / examples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {f"tokens_{name}": tokens, f"examples_{name}": examples}


def _figures(split: Split[Any], tokenized: TokenizedExamples | TokenizedRows) -> dict[str, int]:
    """Counts of a split, and its lengths in tokens (prompt, summary and EOS; or texts and special tokens)."""
    lengths = tokenized.split.lengths.sort().values
    last = len(lengths) - 1
    return {
        **split.counts.as_dict(),
        "dropped_overlong": tokenized.dropped_overlong,
        "truncated": tokenized.truncated,
        "used": len(tokenized.examples),
        "seen_in_train": sum(example.seen_in_train for example in tokenized.examples),
        "tokens": int(lengths.sum()),
        "length_p50": int(lengths[round(0.5 * last)]),
        "length_p95": int(lengths[round(0.95 * last)]),
        "length_max": int(lengths[-1]),
    }


_TABLE_ROWS = {
    "rows": "rows read",
    "dropped_empty": "dropped: empty dialogue",
    "dropped_no_summary": "dropped: no summary",
    "dropped_duplicates": "dropped: duplicate",
    "dropped_overlong": "dropped: too long",
    "held_out": "held out for validation",
    "left_out": "left out (sampled)",
    "used": "rows used",
    "truncated": "  dialogue cut",
    "seen_in_train": "  dialogue also in train",
    "tokens": "tokens",
    "length_p50": "  a row: median",
    "length_p95": "  a row: 95th percentile",
    "length_max": "  a row: longest",
}


_LABELLED_TABLE_ROWS = {
    **{key.replace("no_summary", "no_label"): label for key, label in _TABLE_ROWS.items()},
    "dropped_empty": "dropped: empty text",
    "dropped_no_label": "dropped: no label",
    "truncated": "  text cut",
    "seen_in_train": "  text also in train",
}
_MOST_LABELS_SHOWN = 20


_TEXT_TABLE_ROWS = {
    "rows": "rows cut",
    "held_out": "held out for validation",
    "left_out": "left out (sampled)",
    "used": "rows used",
    "seen_in_train": "  row also in train",
    "tokens": "tokens",
    "length_p50": "  a row: median",
    "length_max": "  a row: longest",
}


def _show(
    ctx: StageContext, figures: Mapping[str, Mapping[str, Any]], sources: dict[str, str], shown: dict[str, str]
) -> None:
    for name in SPLITS:
        ctx.reporter.info(f"{name}: {sources[name]}")
    rows = [[label, *(f"{figures[name][key]:,}" for name in SPLITS)] for key, label in shown.items()]
    ctx.reporter.table("Rows and tokens", ["", *SPLITS], rows)
