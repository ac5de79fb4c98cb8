"""evaluate on rows to classify, of tiny random BERTs, through the runner: scores, resuming, several processes."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import CheckpointError, DataError, Interrupted, ModelError
from hedgehog.pipeline.evaluation import labelled
from hedgehog.pipeline.manifest import Manifest, StageInput, describe_artifact, read_manifest
from hedgehog.pipeline.report.writing import write_report
from hedgehog.pipeline.row_log import read_complete_rows
from hedgehog.pipeline.runner import run_pipeline, run_stage
from hedgehog.pipeline.status import read_status
from hedgehog.pipeline.variants import load_variant_model
from hedgehog.stages import evaluate

VARIANTS = ("main", "softmax", "zero_shot")
NAMES = ["no", 'not | "sure" <b>\n`', "yes"]
"""The last but one has what table, page and card give a meaning to."""
CLS, SEP, PAD = 1, 2, 0
NUM_ROWS = 8


def a_row(number: int) -> tuple[list[int], list[int]]:
    """A pair whose texts grow with its number, in this order the longest last."""
    first = [CLS, *(3 + (5 * number + k) % 40 for k in range(1 + number)), SEP]
    return first, [*(3 + (7 * number + 3 * k) % 40 for k in range(1 + number // 2)), SEP]


LABELS = [0, 2, 0, 0, 2, 0, 2, 0]
"""Class 1 never occurs."""


def finish(folder: Path, stage: str, artifacts: dict[str, str], **fields: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    described = {name: describe_artifact(folder, path) for name, path in artifacts.items()}
    values = {"status": "done", "fingerprint": "", "config": {}, "duration_s": 60.0, **fields}
    Manifest(stage=stage, artifacts=described, **values).write(folder)


def write_split(prepare: Path, labels: list[int], names: list[str], seen_in_train: set[int]) -> None:
    prepare.mkdir(parents=True, exist_ok=True)
    rows = [a_row(number) for number in range(len(labels))]
    TokenizedSplit.from_rows(rows, labels).write(prepare / "tokens_test.safetensors")
    examples = [
        {
            "id": f"r{number}",
            "text": f"first {number}",
            "second_text": f"second {number}",
            "label": names[label],
            "seen_in_train": number in seen_in_train,
        }
        for number, label in enumerate(labels)
    ]
    (prepare / "examples_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
    artifacts = {"tokens_test": "tokens_test.safetensors", "examples_test": "examples_test.jsonl"}
    summary = {"kind": "classification", "label_names": names, "pad_id": PAD, "model_type": "bert"}
    finish(prepare, "prepare", artifacts, summary=summary)


def bert(num_classes: int, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config: Any = BertConfig(**sizes, intermediate_size=48, initializer_range=0.5)
    config.num_labels = num_classes
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, BertForSequenceClassification]:
    """What evaluate loads for each variant."""
    known = {name: bert(len(NAMES), seed) for seed, name in enumerate(VARIANTS)}

    def load(config: RunConfig, *_: Any) -> BertForSequenceClassification:
        linear, tuned = config.model.attention == "linear", config.finetune.enabled
        return known["main" if linear else "softmax" if tuned else "zero_shot"]

    monkeypatch.setattr(evaluate, "load_variant_model", load)
    return known


@pytest.fixture
def run(tmp_path: Path, models: Any) -> RunConfig:
    """Ready for evaluate."""
    config = RunConfig.model_validate(
        {
            "name": "c",
            "output_dir": str(tmp_path),
            "model": {"base": "some/bert"},
            "data": {"kind": "classification", "dataset": "some/rows", "second_text_field": "hypothesis"},
            "engine": {"device": "cpu", "precision": "float32", "cpu_threads": 1},
            "evaluate": {"batch_size": 3, "bootstrap_samples": 40},
            "variants": {
                "softmax": {"label": "softmax | LoRA", "overrides": {"model.attention": "softmax"}},
                "zero_shot": {"overrides": {"model.attention": "softmax", "finetune.enabled": False}},
            },
        }
    )
    root = tmp_path / "c"
    write_split(root / "prepare", LABELS, NAMES, seen_in_train={2, 5})
    for name in VARIANTS:
        place = root if name == "main" else root / "variants" / name
        skipped = None if name == "main" else "softmax attention has no feature maps"
        finish(place / "distill", "distill", {}, summary={"kl_mean": 0.25}, skipped=skipped)
        finish(place / "finetune", "finetune", {}, skipped="off" if name == "zero_shot" else None)
    return config


def folder(config: RunConfig) -> Path:
    return Path(config.output_dir) / config.name / "evaluate"


def results(config: RunConfig) -> dict[str, str]:
    """All files that must not depend on how often the evaluation was interrupted."""
    kept = [folder(config) / "rouge.json", folder(config) / "results.md", *(folder(config) / "predictions").iterdir()]
    return {str(file.relative_to(folder(config))): file.read_text() for file in sorted(kept)}


@pytest.fixture
def uninterrupted(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    elsewhere = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(run.output_dir, elsewhere, dirs_exist_ok=True)
    config = run.model_copy(update={"output_dir": str(elsewhere)})
    run_stage(config, "evaluate")
    return results(config)


@torch.no_grad()
def slow_answers(model: BertForSequenceClassification, num_rows: int = NUM_ROWS) -> list[tuple[int, list[float]]]:
    """Each row by itself, without padding: its most likely class, and all of -log p."""
    answers = []
    for number in range(num_rows):
        first, second = a_row(number)
        kinds = torch.tensor([[0] * len(first) + [1] * len(second)])
        logits = model(input_ids=torch.tensor([first + second]), token_type_ids=kinds).logits[0].double()
        answers.append((int(logits.argmax()), (logits.logsumexp(0) - logits).tolist()))
    return answers


def test_rows_are_what_each_model_says_of_each_row_alone(run, models, capsys):
    manifest = run_stage(run, "evaluate")
    report = json.loads((folder(run) / "rouge.json").read_text())
    for name in VARIANTS:
        rows = read_complete_rows(folder(run) / "predictions" / f"{name}.jsonl")
        answers = slow_answers(models[name])
        assert [list(row) for row in rows] == [
            ["index", "id", "label", "prediction", "loss_nats", "seen_in_train"]
        ] * NUM_ROWS
        for number, (row, (best, nats)) in enumerate(zip(rows, answers, strict=True)):
            assert (row["index"], row["id"], row["seen_in_train"]) == (number, f"r{number}", number in (2, 5))
            assert (row["label"], row["prediction"]) == (NAMES[LABELS[number]], NAMES[best])
            assert row["loss_nats"] == pytest.approx(nats[LABELS[number]], rel=1e-4, abs=1e-5)
        figures = report["variants"][name]["all"]
        right = sum(best == label for (best, _), label in zip(answers, LABELS, strict=True))
        assert figures["accuracy"]["value"] == pytest.approx(100 * right / NUM_ROWS)
        mean_nats = sum(nats[label] for (_, nats), label in zip(answers, LABELS, strict=True)) / NUM_ROWS
        assert figures["loss_nats_per_row"]["value"] == pytest.approx(mean_nats, rel=1e-4)
        assert report["variants"][name]["unseen"]["num_examples"] == NUM_ROWS - 2
    assert len({tuple(best for best, _ in slow_answers(model)) for model in models.values()}) == 3, "they differ"
    assert (report["kind"], report["softmax_reference"]) == ("classification", "softmax")
    assert report["label_counts"] == {NAMES[0]: 5, NAMES[1]: 0, NAMES[2]: 3}
    assert report["settings"]["f1_class"] is None and "generation" not in report["variants"]["main"]
    assert "accuracy_difference" in report["variants"]["main"]["all"]
    assert set(manifest.artifacts) == {"rouge", "predictions"} and not (folder(run) / "reference_losses").exists()
    assert manifest.summary["variants"]["main"]["accuracy"] == report["variants"]["main"]["all"]["accuracy"]["value"]
    records = [json.loads(line) for line in (folder(run) / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 10))
    for record, name in zip(records[2::3], VARIANTS, strict=True):
        figures = report["variants"][name]["all"]
        assert record["loss_nats"] == pytest.approx(figures["loss_nats_per_row"]["value"])
        assert record["accuracy_percent"] == pytest.approx(figures["accuracy"]["value"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "main: classifies 8 rows" in shown and "points" in shown and "accuracy" in shown


def test_the_table_says_how_it_was_measured(run):
    run_stage(run, "evaluate")
    table = (folder(run) / "results.md").read_text()
    assert table.startswith("# c: 8 test rows\n\n| variant | accuracy | F1 | MCC | loss | mean KL |")
    assert "| softmax \\| LoRA |" in table and "F1 (the mean over the classes)" in table
    assert "2 of which stand word for word in train" in table
    assert "The most frequent label, `no`, is that of 62.5%." in table
    assert table.count("\n| ") == 4 and len(table.splitlines()) == 13


def test_two_classes_have_the_f1_of_the_second(run, models):
    names = ["no", NAMES[1]]
    models.update({name: bert(2, seed) for seed, name in enumerate(VARIANTS)})
    write_split(folder(run).parent / "prepare", [1, 1, 1, 0, 1], names, set())
    run_stage(run, "evaluate")
    report = json.loads((folder(run) / "rouge.json").read_text())
    assert report["settings"]["f1_class"] == names[1]
    table = (folder(run) / "results.md").read_text()
    assert r'F1 (that of ``"not | \"sure\" <b>\n`"``)' in table and len(table.splitlines()) == 13


@pytest.mark.parametrize("samples", [0, 20])
def test_one_row(run, samples):
    config = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"bootstrap_samples": samples})})
    write_split(folder(run).parent / "prepare", [2], NAMES, {0})
    run_stage(config, "evaluate")
    report = json.loads((folder(run) / "rouge.json").read_text())
    for variant in report["variants"].values():
        assert variant["unseen"] is None and variant["all"]["mcc"]["value"] == 0
        assert (variant["all"]["accuracy"]["low"] is None) == (samples == 0)
    assert ("±" in (folder(run) / "results.md").read_text()) == (samples > 0)


def test_no_row_at_all(run):
    write_split(folder(run).parent / "prepare", [], NAMES, set())
    with pytest.raises(DataError, match="the test split has no rows"):
        run_stage(run, "evaluate")


def test_shards_joined_give_the_same_files(run, uninterrupted, monkeypatch):
    shards = [run_stage(run, "evaluate", shard=f"{index}/2") for index in range(2)]
    assert [sum(manifest.summary["num_rows"].values()) for manifest in shards] == [15, 9]  # batches of 3, 3 and 2 rows
    assert all(set(manifest.artifacts) == {"predictions"} for manifest in shards)
    monkeypatch.setattr(evaluate, "load_variant_model", lambda *_: pytest.fail("the merge needs no model"))
    run_stage(run, "evaluate")
    assert results(run) == uninterrupted


class Killed(BaseException):
    """Stands for a kill: nothing in the stage may catch it."""


def test_killed_and_resumed_gives_the_same_files(run, uninterrupted, monkeypatch):
    original, calls = labelled.class_logits, 0

    def dies_in_the_second_variant(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(labelled, "class_logits", dies_in_the_second_variant)
    with pytest.raises(Killed):
        run_stage(run, "evaluate")
    half = folder(run) / "predictions" / "softmax.jsonl"
    half.write_text(half.read_text() + '{"index": 2, "id": "r2", "lab')
    run_stage(run, "evaluate")
    assert results(run) == uninterrupted and calls == 10


def test_resumes_inside_a_batch_after_a_torn_line(run, uninterrupted):
    run_stage(run, "evaluate")
    file = folder(run) / "predictions" / "main.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[5], lines[0], lines[2]]) + lines[1][:20])
    manifest = read_manifest(folder(run))
    assert manifest is not None
    manifest.model_copy(update={"status": "running"}).write(folder(run))
    run_stage(run, "evaluate")
    assert results(run) == uninterrupted


def test_two_ranks_finish_what_one_began(run, uninterrupted, in_two_threads: Callable[..., Any], monkeypatch):
    computed: dict[int, int] = {}
    original = labelled.class_logits

    def count_by_thread(*arguments: Any) -> torch.Tensor:
        computed[threading.get_ident()] = computed.get(threading.get_ident(), 0) + 1
        return original(*arguments)

    predictions = folder(run) / "predictions"
    predictions.mkdir(parents=True)
    lines = uninterrupted["predictions/main.jsonl"].splitlines(keepends=True)
    (predictions / "main.jsonl").write_text(lines[4])
    (predictions / "main.rank3.jsonl").write_text(lines[6] + lines[3] + "{")
    monkeypatch.setattr(evaluate, "run", in_two_threads(evaluate.run))
    monkeypatch.setattr(labelled, "class_logits", count_by_thread)
    run_stage(run, "evaluate")
    assert results(run) == uninterrupted
    assert len(computed) == 2 and min(computed.values()) >= 3


def test_a_signal_keeps_the_finished_batches(run, uninterrupted, monkeypatch):
    asked = 0

    def stop_at_the_third(saved: str) -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Interrupted(saved, signals=("SIGTERM",), requeue=True)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "stop_if_asked", stop_at_the_third)
        with pytest.raises(Interrupted, match="evaluate stopped by SIGTERM: the rows made so far are kept"):
            run_stage(run, "evaluate")
    assert len(read_complete_rows(folder(run) / "predictions" / "main.jsonl")) == 6
    run_stage(run, "evaluate")
    assert results(run) == uninterrupted


def test_batch_size_does_not_change_the_predictions(run, uninterrupted):
    config = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"batch_size": 8})})
    run_stage(config, "evaluate")
    for name in VARIANTS:
        rows, others = (
            [json.loads(line) for line in files[f"predictions/{name}.jsonl"].splitlines()]
            for files in (results(config), uninterrupted)
        )
        assert [row["prediction"] for row in rows] == [row["prediction"] for row in others]
        assert [row["loss_nats"] for row in rows] == pytest.approx([row["loss_nats"] for row in others], rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_gives_nan_is_named(run, models, value):
    models["softmax"].classifier.bias.data[1] = value  # a class that no row has
    with pytest.raises(ModelError, match=r"softmax \| LoRA: the loss of 8 test rows is not finite \(first: row 0\)"):
        run_stage(run, "evaluate")
    assert not (folder(run) / "rouge.json").exists()


def test_an_adapter_of_data_prepared_before_is_refused(converted: RunConfig, tmp_path: Path) -> None:
    """Prepared anew with other classes of the same number, it would be scored by the wrong ones."""
    shutil.copytree(Path(converted.output_dir) / converted.name, tmp_path / converted.name)
    own = converted.model_copy(update={"output_dir": str(tmp_path)})
    file = tmp_path / converted.name / "prepare" / "manifest.json"
    manifest = Manifest.model_validate_json(file.read_text())
    tokens = manifest.artifacts["tokens_train"]
    changed = {"tokens_train": tokens.model_copy(update={"sha256": "0" * 64})}
    manifest.model_copy(update={"artifacts": manifest.artifacts | changed}).write(file.parent)
    for stage in ("evaluate", "export"):
        shutil.rmtree(tmp_path / converted.name / stage, ignore_errors=True)
        with pytest.raises(CheckpointError, match=r"was made from an earlier prepare than there is now; .*--force"):
            run_stage(own, stage)


def test_a_head_of_other_classes_is_refused(run, models):
    models["main"] = bert(2, 0)
    with pytest.raises(ModelError, match="head has 2 outputs, but the data need 3"):
        run_stage(run, "evaluate")


def test_logits_in_bfloat16_become_float32():
    model: Any = bert(3, 1)
    batch = {
        "input_ids": torch.tensor([[CLS, 5, SEP]]),
        "mask": torch.ones(1, 3, dtype=torch.bool),
        "token_type_ids": torch.zeros(1, 3, dtype=torch.long),
    }
    assert labelled.class_logits(model.to(torch.bfloat16), batch).dtype == torch.float32


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny BERT that was converted, in a few steps, and scored beside its softmax."""
    schedule = {"max_steps": 4, "global_batch_size": 8, "micro_batch_size": 8}
    config = RunConfig.model_validate(
        {
            "name": "b",
            "output_dir": str(tmp_path_factory.mktemp("converted")),
            "tiny": {
                "architecture": "bert",
                "num_train_dialogues": 40,
                "num_validation_dialogues": 8,
                "num_test_dialogues": 20,
                "vocab_size": 500,
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 64,
                "pretrain_steps": 6,
            },
            "data": {"kind": "classification", "max_length_tokens": 256},
            "distill": schedule,
            "finetune": schedule,
            "evaluate": {"batch_size": 6, "bootstrap_samples": 20},
            "engine": {"zero_stage": 0, "precision": "float32", "device": "cpu", "cpu_threads": 1},
            "variants": {"softmax": {"overrides": {"model.attention": "softmax"}}},
        }
    )
    run_pipeline(config, last="evaluate")
    return config


@torch.no_grad()
def test_a_converted_bert_says_of_each_row_alone_what_evaluate_wrote(converted):
    root = folder(converted).parent
    inputs = {}
    for stage in ("prepare", "distill", "finetune"):
        manifest = read_manifest(root / stage)
        assert manifest is not None
        inputs[stage] = StageInput(root / stage, manifest)
    model: Any = load_variant_model(converted, inputs, torch.device("cpu"), "float32", lambda _: None)
    names = inputs["prepare"].summary["label_names"]
    split = TokenizedSplit.open(root / "prepare/tokens_test.safetensors")
    assert split.labels is not None
    rows = read_complete_rows(folder(converted) / "predictions/main.jsonl")
    assert len(rows) == len(split) == 20
    for number, row in enumerate(rows):
        ids, num_first = split[number]
        kinds = (torch.arange(len(ids)) >= num_first).long()
        logits = model(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], token_type_ids=kinds[None]
        ).logits[0]
        nats = logits.double().logsumexp(0) - logits.double()
        assert row["label"] == names[split.labels[number]] and row["prediction"] == names[int(logits.argmax())]
        assert row["loss_nats"] == pytest.approx(float(nats[split.labels[number]]), rel=1e-4)


def test_a_converted_bert_has_a_table_a_page_and_a_state(converted):
    root = folder(converted).parent
    assert "KL (nats)" in (folder(converted) / "results.md").read_text()
    page = write_report(str(root)).read_text()
    assert "Accuracy of every variant" in page and "Mistakes" in page and "No scores" not in page
    stage = {stage.title: stage for stage in read_status(str(root)).stages}["evaluate"]
    loss = json.loads((folder(converted) / "rouge.json").read_text())["variants"]["main"]["all"]["loss_nats_per_row"]
    assert (stage.step, stage.loss_name, stage.loss) == (40, "test_loss_nats", loss["value"])
