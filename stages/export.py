"""Stage four: one folder that plain transformers loads, and the proof that it does.

    load unmerged → answer the probe → write merged weights, configs, modeling files → reload in a clean process
    → compare → model card → rename to model/ → push, if asked

Everything is written to a temporary folder that gets its name only when the comparison is done, so a killed export
leaves no folder that looks complete; the same command begins it again. Only rank 0 works.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..pipeline.class_drift import class_logits_in_clean_process, make_class_probe
from ..pipeline.classification_head import class_logits
from ..pipeline.config import LABELLED_KINDS, RunConfig
from ..pipeline.data.tokenize import TextEncoder, choose_pad_id, load_prepared_tokenizer
from ..pipeline.data.tokens import TokenizedSplit
from ..pipeline.drift import answer_in_clean_process, answer_probe, logit_drift, make_probe, measure_drift
from ..pipeline.errors import ModelError
from ..pipeline.export_folder import (
    check_disk_space,
    copy_licence_files,
    push_folder,
    write_configs,
    write_weights,
)
from ..pipeline.families import FAMILIES
from ..pipeline.interrupts import stop_if_asked
from ..pipeline.manifest import Manifest, StageInput, read_manifest
from ..pipeline.merging import merged_tensors
from ..pipeline.metrics import format_bytes
from ..pipeline.model_card import CardFacts, write_model_card
from ..pipeline.run_folder import RunFolder, atomic_directory, write_json
from ..pipeline.stage_context import StageContext, StageResult
from ..pipeline.variants import load_variant_model

CONSUMES = ("prepare", "distill", "finetune")
SECTIONS = ("export", "model", "engine.precision", "finetune.enabled")
IGNORED = frozenset({"export.push_to_hub"})

_SAVED = "the unfinished folder was removed, and export begins anew"


def still_to_do(config: RunConfig, run_folder: RunFolder, manifest: Manifest) -> str | None:
    """Why a finished export is taken up again: to be uploaded, or because evaluate has scored these weights since."""
    if manifest.status != "done":
        return None
    target = config.export.push_to_hub
    if target is not None and manifest.summary.get("pushed_repo") != target:
        return f"not uploaded to {target} yet"
    evaluate = read_manifest(run_folder.stage("evaluate"))
    if evaluate is not None and evaluate.status == "done":
        prefix = f"{manifest.variant or 'main'}/"
        scored = {stage: evaluate.consumed.get(prefix + stage) for stage in ("distill", "finetune")}
        same = all(manifest.consumed.get(stage) == fingerprint for stage, fingerprint in scored.items())
        if same and manifest.summary.get("scored_by") != evaluate.output_fingerprint:
            return "its model card lacks evaluate's scores"
    return None


def run(ctx: StageContext) -> StageResult:
    """Export this conversion (main, or the variant asked for) to `model/`.

    Raises:
        ModelError: the folder does not load in a clean process, or differs by more than `export.max_logit_drift`.
        ResourceError: the disk is too small, or the hub refuses the upload.
        Interrupted: a signal came, between two steps; the unfinished folder was removed.
    """
    if not ctx.world.is_main:
        return StageResult()
    folder, record = ctx.folder / "model", ctx.folder / "exported.json"
    summary = _earlier_summary(ctx, folder, record)
    if summary is None:
        summary = _export(ctx, folder)
    else:
        summary["scored_by"] = _write_card(ctx, folder, summary)
    write_json(record, {"fingerprint": ctx.fingerprint, "summary": summary})
    if ctx.config.export.push_to_hub is not None:
        stop_if_asked("the exported folder is complete, the upload not begun")
        ctx.reporter.info(f"uploads {folder} to {ctx.config.export.push_to_hub}")
        summary["pushed_to"] = push_folder(folder, ctx.config.export.push_to_hub)
        summary["pushed_repo"] = ctx.config.export.push_to_hub
        ctx.reporter.info(f"uploaded: {summary['pushed_to']}")
    return StageResult(artifacts={"model": "model", "drift": "drift.json"}, summary=summary)


def _earlier_summary(ctx: StageContext, folder: Path, record: Path) -> dict[str, Any] | None:
    """The summary of an export that was complete when an earlier attempt ended (while uploading), or None."""
    if not (folder.is_dir() and record.is_file()):
        return None
    earlier = json.loads(record.read_text(encoding="utf-8"))
    return earlier["summary"] if earlier["fingerprint"] == ctx.fingerprint else None


def _export(ctx: StageContext, folder: Path) -> dict[str, Any]:
    config, prepare = ctx.config, ctx.inputs["prepare"]
    dtype = getattr(torch, config.export.dtype)
    tokenizer = load_prepared_tokenizer(prepare, config.model, ctx.reporter.warning)
    pad_id, _ = choose_pad_id(tokenizer)
    comparison = _comparison(ctx, tokenizer, pad_id)

    stop_if_asked(_SAVED)
    model = load_variant_model(config, ctx.inputs, ctx.world.device, config.engine.precision, ctx.reporter.info)
    stop_if_asked(_SAVED)
    comparison.ask(model)
    stop_if_asked(_SAVED)
    tensors = merged_tensors(model, dtype)
    num_bytes = check_disk_space(ctx.folder, tensors)

    with atomic_directory(folder) as unfinished:
        ctx.reporter.info(f"writes {format_bytes(num_bytes)} of {config.export.dtype} weights")
        shards = write_weights(unfinished, tensors, config.export.max_shard_size)
        write_configs(unfinished, model, tokenizer, pad_id, dtype=dtype, tensor_names=tensors)
        licence_files = copy_licence_files(unfinished, prepare.summary["base_model"])
        num_parameters = sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in tensors.values())
        # the clean process needs the memory that the unmerged model holds
        del model, tensors
        gc.collect()
        if ctx.world.device.type == "cuda":
            torch.cuda.empty_cache()
        stop_if_asked(_SAVED)
        drift, adds_bos = _check_reload(ctx, unfinished, comparison)
        summary = {
            "drift": drift,
            "num_shards": len(shards),
            "num_bytes": num_bytes,
            "num_parameters": num_parameters,
            "licence_files": licence_files,
            "tokenizer_adds_bos": adds_bos,
        }
        summary["scored_by"] = _write_card(ctx, unfinished, summary)
    said = f"loads with plain transformers; greatest logit difference {drift['logits_max_abs']:.3g}"
    if config.data.kind != "regression":  # one output is always the likeliest
        said += f", equal {comparison.ANSWERS} {drift[comparison.EQUAL_SHARE]:.1%}"
    ctx.reporter.info(said)
    ctx.reporter.info(f"model     {folder}")
    return summary


def _write_card(ctx: StageContext, folder: Path, summary: Mapping[str, Any]) -> str | None:
    """Write the model card; returns the fingerprint of the evaluation whose scores it shows."""
    scores, baseline, num_examples, scored_by = _measured_scores(ctx)
    write_model_card(
        folder,
        ctx.config,
        CardFacts(
            family=FAMILIES[ctx.inputs["prepare"].summary.get("model_type", "llama")],
            drift=summary["drift"],
            licence_files=summary["licence_files"],
            tokenizer_adds_bos=summary["tokenizer_adds_bos"],
            kl_mean_nats=ctx.inputs["distill"].summary.get("kl_mean"),
            scores=scores,
            baseline=baseline,
            num_examples=num_examples,
            dtype=ctx.config.export.dtype,
            label_names=ctx.inputs["prepare"].summary.get("label_names", ()),
        ),
    )
    return scored_by


class _Generation:
    """Unmerged and exported model on the same few prompts: logits, and the tokens that follow."""

    ANSWERS = "greedy tokens"
    EQUAL_SHARE = "equal_generated_share"

    def __init__(self, ctx: StageContext, tokenizer: Any, pad_id: int) -> None:
        prepare = ctx.inputs["prepare"]
        prompts = None
        if prepare.summary.get("kind") != "text":
            with open(prepare.artifact("examples_test"), encoding="utf-8") as file:
                prompts = [json.loads(line)["prompt"] for line in file]
        probe = make_probe(
            TokenizedSplit.open(prepare.artifact("tokens_test")),
            prompts,
            pad_id,
            num_positions=prepare.summary.get("num_positions"),
        )
        if prompts is None:  # some of the text, for the exported tokenizer to give the same tokens of
            texts = [tokenizer.decode(row, skip_special_tokens=True) for row in probe.prompt_ids_BL.tolist()]
            probe = replace(probe, prompts=texts, prompt_tokens=TextEncoder(tokenizer).prompts(texts))
        self._ctx, self._probe = ctx, probe
        self._ids = {"eos_id": tokenizer.eos_token_id, "pad_id": pad_id}

    def ask(self, model: Any) -> None:
        self._ctx.reporter.info(f"the unmerged model answers {len(self._probe.prompt_ids_BL)} prompts of the test rows")
        self._reference = answer_probe(model, self._probe, **self._ids)

    def compare(self, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any], bool]:
        """The drift, facts about the load, and whether the tokenizer adds BOS by itself."""
        exported, facts = answer_in_clean_process(folder, self._probe, **options)
        drift = measure_drift(self._reference, exported, self._probe)
        return drift, facts, facts["encoded_with_special_tokens"] == self._probe.prompt_tokens


class _Classification:
    """The same on the same few rows: logits of the classes, or the scores."""

    ANSWERS = "classes"
    EQUAL_SHARE = "equal_argmax_share"

    def __init__(self, ctx: StageContext, pad_id: int) -> None:
        prepare = ctx.inputs["prepare"]
        split = TokenizedSplit.open(prepare.artifact("tokens_test"))
        # what prepare cut rows to, whatever the config says since
        max_length = prepare.manifest.config["data.max_length_tokens"]
        self._ctx = ctx
        self._probe = make_class_probe(split, prepare.artifact("examples_test"), pad_id, max_length)

    def ask(self, model: Any) -> None:
        self._ctx.reporter.info(f"the unmerged model reads {len(self._probe.rows)} test rows")
        with torch.inference_mode():
            self._reference = class_logits(model, self._probe.batch).cpu()

    def compare(self, folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any], bool]:
        exported, facts = class_logits_in_clean_process(folder, self._probe, **options)
        return logit_drift(self._reference, exported), facts, True


def _comparison(ctx: StageContext, tokenizer: Any, pad_id: int) -> _Generation | _Classification:
    if ctx.inputs["prepare"].summary.get("kind") in LABELLED_KINDS:
        return _Classification(ctx, pad_id)
    return _Generation(ctx, tokenizer, pad_id)


def _check_reload(
    ctx: StageContext, folder: Path, comparison: _Generation | _Classification
) -> tuple[dict[str, Any], bool]:
    """The drift report, written to drift.json; and whether the tokenizer adds BOS by itself.

    Raises:
        ModelError: the drift is larger than allowed.
    """
    linear = ctx.config.model.attention == "linear"
    ctx.reporter.info("reloads the export in a clean process")
    drift, facts, adds_bos = comparison.compare(folder, device=ctx.world.device, trust_remote_code=linear)
    limit = ctx.config.export.max_logit_drift
    write_json(
        ctx.folder / "drift.json",
        {
            **drift,
            "unmerged": {"precision": ctx.config.engine.precision, "quantization": ctx.config.model.quantization},
            "exported": {"dtype": facts["dtype"], "model_class": facts["model_class"]},
            "max_logit_drift": limit,
        },
    )
    if limit is not None and drift["logits_max_abs"] > limit:
        raise ModelError(
            f"merged and unmerged logits differ by up to {drift['logits_max_abs']:.4g}, more than "
            f"export.max_logit_drift={limit:g} ({ctx.folder / 'drift.json'} has the report): export with a wider "
            "export.dtype, or raise the limit. The rejected folder was removed."
        )
    return drift, adds_bos


def _measured_scores(
    ctx: StageContext,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, int | None, str | None]:
    """rouge.json's entries of this conversion and of the softmax baseline, the number of examples, and evaluate's
    fingerprint: if evaluate scored these very weights."""
    evaluate = ctx.run_folder.stage("evaluate")
    manifest = read_manifest(evaluate)
    name = ctx.variant or "main"
    if manifest is None or manifest.status != "done":
        ctx.reporter.info("evaluate has not run: the model card has no scores")
        return None, None, None, None
    for stage in ("distill", "finetune"):
        if manifest.consumed.get(f"{name}/{stage}") != ctx.inputs[stage].manifest.output_fingerprint:
            ctx.reporter.warning("evaluate scored other weights than these: the model card has no scores")
            return None, None, None, None
    report = json.loads(StageInput(evaluate, manifest).artifact("rouge").read_text(encoding="utf-8"))
    baseline = report["softmax_reference"]
    return (
        report["variants"][name],
        report["variants"][baseline] if baseline not in (None, name) else None,
        report["num_examples"],
        manifest.output_fingerprint,
    )
