"""evaluate on tiny random models, through the runner: scores, resuming, several processes."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import CheckpointError, ConfigError, Interrupted, ModelError
from hedgehog.pipeline.evaluation import dialogues, losses
from hedgehog.pipeline.manifest import describe_artifact, read_manifest
from hedgehog.pipeline.report.writing import write_report
from hedgehog.pipeline.rouge import UNSCORABLE, score_rouge
from hedgehog.pipeline.row_log import read_complete_rows
from hedgehog.pipeline.runner import run_stage
from hedgehog.stages import evaluate

VARIANTS = ("main", "softmax", "zero_shot")


def folder(config: RunConfig) -> Path:
    return Path(config.output_dir) / config.name / "evaluate"


def results(config: RunConfig) -> dict[str, str]:
    """All files that must not depend on how often the evaluation was interrupted."""
    kept = [folder(config) / "rouge.json"]
    for kind in ("predictions", "reference_losses"):
        kept += sorted((folder(config) / kind).iterdir())
    return {str(file.relative_to(folder(config))): file.read_text() for file in kept}


@pytest.fixture(scope="module")
def uninterrupted(finished_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import shutil

    output_dir = tmp_path_factory.mktemp("uninterrupted")
    shutil.copytree(finished_run.output_dir, output_dir, dirs_exist_ok=True)
    config = finished_run.model_copy(update={"output_dir": str(output_dir)})
    run_stage(config, "evaluate")
    return results(config)


def test_scores_are_those_of_the_written_predictions(copied_run: RunConfig, capsys: pytest.CaptureFixture[str]):
    finetune = folder(copied_run).parent / "variants" / "softmax" / "finetune"
    merged = read_manifest(finetune)
    assert merged is not None
    merged.summary |= {"parts_duration_s": 600.0, "parts_peak_memory_bytes": 5 << 20}  # as of merged layers
    merged.write(finetune)
    prepare = folder(copied_run).parent / "prepare"
    prepared = read_manifest(prepare)
    assert prepared is not None
    prepared.summary["tokenizer_fingerprint"] = "of another"
    prepared.write(prepare)
    manifest = run_stage(copied_run, "evaluate")
    report = json.loads((folder(copied_run) / "rouge.json").read_text())
    assert list(report["variants"]) == list(VARIANTS)
    assert (report["num_examples"], report["num_examples_seen_in_train"]) == (7, 1)
    assert report["softmax_reference"] == "softmax"
    for name in VARIANTS:
        rows = read_complete_rows(folder(copied_run) / "predictions" / f"{name}.jsonl")
        assert [row["index"] for row in rows] == list(range(7))
        direct = score_rouge([row["prediction"] for row in rows], [row["reference"] for row in rows])
        figures = report["variants"][name]
        assert figures["all"]["rougeLsum"]["value"] == pytest.approx(100 * direct.f1_N["rougeLsum"].mean().item())
        assert figures["unseen"]["num_examples"] == 6
        assert figures["generation"]["num_truncated"] == sum(row["truncated"] for row in rows)
        assert all(row["num_tokens"] <= 8 for row in rows)
    records = [json.loads(line) for line in (folder(copied_run) / "metrics.jsonl").read_text().splitlines()]
    steps = len(records) // len(report["variants"])  # three batches to summarize, three to measure
    shown_last = [record["loss_nats"] for record in records[steps - 1 :: steps]]
    in_table = [variant["all"]["loss_nats_per_token"]["value"] for variant in report["variants"].values()]
    assert shown_last == pytest.approx(in_table), "the progress line ends at the table's figure, not at a batch's"
    assert report["variants"]["main"]["kl_mean_nats"] == 0.25
    assert report["variants"]["zero_shot"]["kl_mean_nats"] is None
    assert manifest.summary["training"]["main"] == {"minutes": 3.0, "peak_memory_bytes": 3 << 20}
    assert manifest.summary["training"]["softmax"] == {"minutes": 11.5, "peak_memory_bytes": 5 << 20}
    assert manifest.summary["training"]["zero_shot"] == {"minutes": None, "peak_memory_bytes": None}
    shown = capsys.readouterr().out
    assert "is another tokenizer than the one that prepare read" in shown
    line = "linear attention: torch (no compiled kernel for cpu, float32, F=16, V=8: it needs a CUDA GPU)"
    assert shown.count(line) == 1, "once, with the reason; softmax has none"
    assert "sample d0:" in shown and "reference: Ann and Bob have lunch at 1." in shown
    assert (folder(copied_run) / "results.md").read_text().count("\n| ") == 4
    assert set(manifest.artifacts) == {"rouge", "predictions"}
    (folder(copied_run).parent / "config.resolved.yaml").unlink()  # names no base model, which a user's has to
    page = write_report(str(folder(copied_run).parent)).read_text()
    assert "No scores" not in page and "7 test dialogues, 1 of which stand word for word in train" in page
    for figures in report["variants"].values():
        assert f'<td class="number">{figures["all"]["rouge2"]["value"]:.2f}</td>' in page
    assert page.count("<article>") == 5 and "have lunch at 1." in page


def test_loss_of_the_untrained_softmax_model_is_llamas_own(finished_run: RunConfig, uninterrupted: dict[str, str]):
    prepare = Path(finished_run.output_dir) / "run" / "prepare"
    llama = LlamaForCausalLM.from_pretrained(prepare / "base_model").eval()
    split = TokenizedSplit.open(prepare / "tokens_test.safetensors")
    nats = tokens = 0.0
    for index in range(len(split)):
        row, prompt_length = split[index]
        labels = row.clone()
        labels[:prompt_length] = -100
        num_targets = len(row) - prompt_length
        with torch.no_grad():
            nats += llama(row[None], labels=labels[None]).loss.item() * num_targets
        tokens += num_targets
    figures = json.loads(uninterrupted["rouge.json"])["variants"]["zero_shot"]["all"]
    assert figures["loss_nats_per_token"]["value"] == pytest.approx(nats / tokens, rel=1e-5)
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert figures["num_reference_tokens"] == tokens


def test_references_in_another_script_are_told_of(copied_run: RunConfig, capsys: pytest.CaptureFixture[str]):
    """rouge-score sees nothing in them: a 0 that no model could better."""
    prepared = Path(copied_run.output_dir) / copied_run.name / "prepare"
    rows = [json.loads(line) for line in (prepared / "examples_test.jsonl").read_text().splitlines()]
    rows[1]["summary"] = "Цем не придёт."
    (prepared / "examples_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((prepared / "manifest.json").read_text())
    described = describe_artifact(prepared, "examples_test.jsonl")
    manifest["artifacts"]["examples_test"] = described.model_dump()
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    run_stage(copied_run, "evaluate")
    said = f"1 of 7 references {UNSCORABLE}"
    assert said in " ".join(capsys.readouterr().out.split())
    assert f"1 of the references {UNSCORABLE}" in (folder(copied_run) / "results.md").read_text()
    assert json.loads((folder(copied_run) / "rouge.json").read_text())["num_references_that_rouge_cannot_score"] == 1


def test_shards_joined_give_the_same_files(
    copied_run: RunConfig, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    shards = [run_stage(copied_run, "evaluate", shard=f"{index}/2") for index in range(2)]
    assert [sum(manifest.summary["num_rows"].values()) for manifest in shards] == [12, 9]  # batches of 3, 3 and 1 rows
    assert not (folder(copied_run) / "rouge.json").exists()
    monkeypatch.setattr(evaluate, "load_variant_model", lambda *_: pytest.fail("the merge needs no model"))
    run_stage(copied_run, "evaluate")
    assert results(copied_run) == uninterrupted


def test_a_killed_shard_and_a_missing_one(
    copied_run: RunConfig, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(losses, "reference_losses", dies)
        with pytest.raises(Killed):
            run_stage(copied_run, "evaluate", shard="0/3")
    run_stage(copied_run, "evaluate", shard="0/3")
    run_stage(copied_run, "evaluate", shard="1/3")
    run_stage(copied_run, "evaluate")
    assert results(copied_run) == uninterrupted


def test_a_shard_of_another_config_is_refused(copied_run: RunConfig):
    other = copied_run.evaluate.model_copy(update={"max_new_tokens": 3})
    run_stage(copied_run.model_copy(update={"evaluate": other}), "evaluate", shard="0/2")
    with pytest.raises(CheckpointError, match=r"shard-0-of-2: .* another config .* --shard 0/2 --force"):
        run_stage(copied_run, "evaluate")


@pytest.mark.parametrize("shard", ["2/2", "0/0", "1", "a/b"])
def test_a_shard_that_is_none(shard: str, copied_run: RunConfig):
    with pytest.raises(ConfigError, match=f"--shard {shard}: "):
        run_stage(copied_run, "evaluate", shard=shard)


class Killed(BaseException):
    """Stands for a kill: nothing in the stage may catch it."""


@pytest.mark.parametrize(
    ("module", "function"),
    [(dialogues, "generate_summaries"), (losses, "reference_losses")],
    ids=["summaries", "losses"],
)
def test_killed_and_resumed_gives_the_same_files(
    module: Any, function: str, copied_run: RunConfig, uninterrupted: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    original = getattr(module, function)
    calls = 0

    def dies_in_the_second_variant(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(module, function, dies_in_the_second_variant)
    with pytest.raises(Killed):
        run_stage(copied_run, "evaluate")
    assert not (folder(copied_run) / "rouge.json").exists()
    run_stage(copied_run, "evaluate")
    assert results(copied_run) == uninterrupted
    # 3 variants of 3 batches each, one of which was begun twice
    assert calls == 10


def test_resumes_inside_a_batch_after_a_torn_line(copied_run: RunConfig, uninterrupted: dict[str, str]):
    run_stage(copied_run, "evaluate")
    predictions = folder(copied_run) / "predictions" / "main.jsonl"
    lines = predictions.read_text().splitlines(keepends=True)
    predictions.write_text("".join([lines[5], lines[0], lines[2]]) + lines[1][:20])
    losses = folder(copied_run) / "reference_losses" / "softmax.jsonl"
    losses.write_text("")
    manifest = json.loads((folder(copied_run) / "manifest.json").read_text())
    (folder(copied_run) / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    run_stage(copied_run, "evaluate")
    assert results(copied_run) == uninterrupted


def test_finished_batches_are_not_computed_again(copied_run: RunConfig, monkeypatch: pytest.MonkeyPatch):
    run_stage(copied_run, "evaluate")
    manifest = json.loads((folder(copied_run) / "manifest.json").read_text())
    (folder(copied_run) / "manifest.json").write_text(json.dumps({**manifest, "status": "running"}))

    def no_model(*_: Any) -> None:
        raise AssertionError("a finished variant needs no model")

    monkeypatch.setattr(evaluate, "load_variant_model", no_model)
    assert run_stage(copied_run, "evaluate").status == "done"


def test_two_ranks_finish_what_one_began(
    copied_run: RunConfig, uninterrupted: dict[str, str], in_two_threads: Any, monkeypatch: pytest.MonkeyPatch
):
    computed: dict[int, int] = {}
    generate = dialogues.generate_summaries

    def count_by_thread(*arguments: Any) -> Any:
        computed[threading.get_ident()] = computed.get(threading.get_ident(), 0) + 1
        return generate(*arguments)

    predictions = folder(copied_run) / "predictions"
    predictions.mkdir(parents=True)
    lines = uninterrupted["predictions/main.jsonl"].splitlines(keepends=True)
    (predictions / "main.jsonl").write_text(lines[4])
    (predictions / "main.rank3.jsonl").write_text(lines[6] + lines[3] + "{")
    monkeypatch.setattr(evaluate, "run", in_two_threads(evaluate.run))
    monkeypatch.setattr(dialogues, "generate_summaries", count_by_thread)
    run_stage(copied_run, "evaluate")
    assert results(copied_run) == uninterrupted
    assert len(computed) == 2 and min(computed.values()) >= 3


def test_a_rank_that_is_stopped_alone_takes_the_other_along(
    copied_run: RunConfig, uninterrupted: dict[str, str], in_two_threads: Any, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[int, int] = {}

    def stop_the_second(saved: str) -> None:
        mine = threading.get_ident()
        asked[mine] = asked.get(mine, 0) + 1
        if mine != next(iter(asked)) and asked[mine] == 2:
            raise Interrupted(saved, signals=("SIGUSR2",), requeue=True)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "run", in_two_threads(evaluate.run))
        patch.setattr(evaluate, "stop_if_asked", stop_the_second)
        with pytest.raises(Interrupted, match="evaluate stopped by SIGUSR2: the rows made so far are kept") as raised:
            run_stage(copied_run, "evaluate")
    assert raised.value.requeue
    assert len(asked) == 2 and sum(asked.values()) > 4, "the other one finished its share"
    run_stage(copied_run, "evaluate")
    assert results(copied_run) == uninterrupted


def test_without_perplexity_and_with_beams(copied_run: RunConfig, uninterrupted: dict[str, str]):
    settings = copied_run.evaluate.model_copy(update={"perplexity": False, "num_beams": 3, "min_new_tokens": 4})
    config = copied_run.model_copy(update={"evaluate": settings, "variants": {}})
    run_stage(config, "evaluate")
    report = json.loads((folder(config) / "rouge.json").read_text())
    assert "perplexity" not in report["variants"]["main"]["all"]
    assert report["softmax_reference"] is None
    assert report["settings"]["generation"]["num_beams"] == 3
    beams = (folder(config) / "predictions" / "main.jsonl").read_text()
    assert beams != uninterrupted["predictions/main.jsonl"]


def test_batch_size_does_not_change_the_predictions(copied_run: RunConfig, uninterrupted: dict[str, str]):
    settings = copied_run.evaluate.model_copy(update={"batch_size": 7})
    config = copied_run.model_copy(update={"evaluate": settings})
    run_stage(config, "evaluate")
    for name in VARIANTS:
        assert results(config)[f"predictions/{name}.jsonl"] == uninterrupted[f"predictions/{name}.jsonl"]


def test_a_model_that_gives_nan_is_named(copied_run: RunConfig, monkeypatch: pytest.MonkeyPatch):
    def nan_losses(model: Any, rows: list[Any], pad_id: int) -> list[tuple[float, int]]:
        return [(math.nan, 1) for _ in rows]

    monkeypatch.setattr(losses, "reference_losses", nan_losses)
    with pytest.raises(ModelError, match=r"main: the loss of 7 test rows is not finite"):
        run_stage(copied_run, "evaluate")


def test_an_adapter_of_another_model_is_refused(copied_run: RunConfig):
    from safetensors.torch import load_file, save_file

    finetune = Path(copied_run.output_dir) / "run" / "finetune"
    file = finetune / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "layers.1" in name))
    save_file(tensors, file)
    manifest = read_manifest(finetune)
    assert manifest is not None
    manifest.artifacts["adapter"] = describe_artifact(finetune, "adapter")
    manifest.write(finetune)
    with pytest.raises(CheckpointError, match=r"does not fit the model \(1 tensors differ"):
        run_stage(copied_run, "evaluate")
