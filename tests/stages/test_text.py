"""A run on running text: both stages learn on it, perplexity is its score, nothing is summarized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hedgehog.pipeline.answers import open_variants
from hedgehog.pipeline.cli import app
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.data.batches import BatchPlan
from hedgehog.pipeline.data.dialogue_corpus import pretraining_texts
from hedgehog.pipeline.data.tiny_pretrain import OneProcess
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import ConfigError, DataError
from hedgehog.pipeline.report.writing import write_report
from hedgehog.pipeline.runner import run_pipeline, run_stage


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_config: Callable[..., RunConfig]) -> Path:
    """A small Llama with its tokenizer; the stages know no difference to a GPT-2 (test_text_rows.py has its tokens)."""
    root = tmp_path_factory.mktemp("base")
    config = tiny_config(root)
    tiny = config.tiny.model_copy(update={"architecture": "llama", "num_key_value_heads": 1})
    run_stage(config.model_copy(update={"tiny": tiny}), "prepare")
    return root / "g/prepare/base_model"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = list(pretraining_texts(120, 3))
    (folder / "train.txt").write_text("\n".join(texts[:100]), encoding="utf-8")
    (folder / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[100:]))
    return folder


def text_config(root: Path, base: Path, corpus: Path, **sections: Any) -> RunConfig:
    schedule = {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 4}
    values: dict[str, Any] = {
        "name": "t",
        "output_dir": str(root),
        "model": {"base": str(base)},
        "data": {"kind": "text", "dataset": str(corpus), "max_length_tokens": 64, "num_validation_examples": 4},
        "distill": schedule,
        "finetune": schedule,
        "evaluate": {"batch_size": 3, "max_new_tokens": 8, "bootstrap_samples": 20},
        "engine": {"zero_stage": 0, "precision": "float32", "device": "cpu", "cpu_threads": 1},
        "export": {"dtype": "float32"},
        "variants": {
            "base": {"overrides": {"model.attention": "softmax", "finetune.enabled": False}},
            "softmax": {"overrides": {"model.attention": "softmax"}},
        },
    }
    return RunConfig.model_validate({**values, **sections})


@pytest.fixture(scope="module")
def finished(base: Path, corpus: Path, tmp_path_factory) -> tuple[RunConfig, Path]:
    root = tmp_path_factory.mktemp("text")
    config = text_config(root, base, corpus)
    run_pipeline(config)
    return config, root / "t"


@torch.no_grad()
def test_the_base_has_the_perplexity_that_transformers_gives(finished, base: Path) -> None:
    """Row by row, on what is saved as the test split."""
    _, folder = finished
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    split = TokenizedSplit.open(folder / "prepare/tokens_test.safetensors")
    nats = num_tokens = 0
    for number in range(len(split)):
        ids, prompt_length = split[number]
        assert prompt_length == 1
        nats += model(ids[None], labels=ids[None]).loss.double() * (len(ids) - 1)
        num_tokens += len(ids) - 1
    scores = json.loads((folder / "evaluate/rouge.json").read_text())
    assert (scores["kind"], scores["num_examples"]) == ("text", len(split))
    figures = scores["variants"]["base"]["all"]
    assert figures["num_reference_tokens"] == num_tokens
    assert figures["loss_nats_per_token"]["value"] == pytest.approx(float(nats / num_tokens), rel=1e-5)
    assert figures["perplexity"]["value"] == pytest.approx(float((nats / num_tokens).exp()), rel=1e-5)
    assert not {"metric", "generation", "prompt_template"} & set(scores["settings"])
    assert "rouge1" not in figures and not (folder / "prepare/examples_test.jsonl").exists()


def test_finetuning_learns_on_every_token_but_the_first(base: Path, corpus: Path, tmp_path: Path) -> None:
    """The first step's loss, of softmax attention, is transformers' own on the whole rows of the same batch."""
    every = {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 4}
    config = text_config(tmp_path, base, corpus, model={"base": str(base), "attention": "softmax"}, finetune=every)
    for stage in ("prepare", "distill", "finetune"):
        run_stage(config, stage)
    record = json.loads((tmp_path / "t/finetune/metrics.jsonl").read_text().splitlines()[0])
    split = TokenizedSplit.open(tmp_path / "t/prepare/tokens_train.safetensors")
    assert set(split.prompt_lengths.tolist()) == {1}
    plan = BatchPlan(split, config.finetune, 64, 0, config.seed, OneProcess(), loss_on="summary")
    (batch,) = plan.step(0)
    rows = [ids[:length] for ids, length in zip(batch["input_ids"], (batch["labels"] != -100).sum(1) + 1, strict=True)]
    assert {len(row) for row in rows} <= set(split.lengths.tolist()), "labels are a row less its first token"
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        nats = sum(float(model(row[None], labels=row[None]).loss) * (len(row) - 1) for row in rows)
    assert record["loss_nats"] == pytest.approx(nats / sum(len(row) - 1 for row in rows), rel=1e-4)


def test_maps_learn_from_text(finished) -> None:
    _, folder = finished
    maps = load_file(folder / "distill/feature_maps.safetensors")
    assert all(not torch.equal(weight, torch.eye(weight.shape[-1]).expand_as(weight)) for weight in maps.values())


def test_tables_and_report_speak_of_no_summary(finished) -> None:
    _, folder = finished
    table = (folder / "evaluate/results.md").read_text()
    assert "| variant | loss | perplexity | mean KL | train min | peak memory |" in table
    assert "test rows of text" in table and "ROUGE" not in table and "nats a token" in table
    page = write_report(str(folder)).read_text(encoding="utf-8")
    assert "ROUGE" not in page and "Summaries" not in page and "rows of text, each read by itself" in page
    assert "Loss of every variant" in page and "perplexity" in page
    card = (folder / "export/model/README.md").read_text()
    assert "made to go on with text" in card and "ROUGE" not in card and "dialogue" not in card
    assert "| | loss (nats a token) | perplexity |" in card


def test_the_export_loads_and_goes_on_with_text(finished) -> None:
    _, folder = finished
    drift = json.loads((folder / "export/drift.json").read_text())
    assert drift["logits_max_abs"] < 1e-3 and drift["equal_generated_share"] == 1
    model = AutoModelForCausalLM.from_pretrained(folder / "export/model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "export/model", trust_remote_code=True)
    inputs = tokenizer("Nick has a cat", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    said = CliRunner().invoke(app, ["generate", str(folder), "--text", "Nick has a cat", "evaluate.max_new_tokens=4"])
    assert said.exit_code == 0, said.output
    expected = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert expected in said.stdout


def test_a_template_is_refused_where_text_is_gone_on_with(finished) -> None:
    run, _ = finished
    folder = str(Path(run.output_dir) / run.name)
    with pytest.raises(ConfigError, match=r"data\.prompt_template: this run goes on with the text"):
        open_variants(folder, overrides=["data.prompt_template={dialogue} =>"])
    assert open_variants(folder)


def test_shards_joined_are_the_whole(finished, tmp_path: Path) -> None:
    config, folder = finished
    shutil.copytree(folder, tmp_path / "t", ignore=shutil.ignore_patterns("evaluate", "export"))
    own = config.model_copy(update={"output_dir": str(tmp_path)})
    for shard in ("0/2", "1/2"):
        assert run_stage(own, "evaluate", shard=shard).summary["num_rows"]["base"] > 0
    run_stage(own, "evaluate")
    joined, whole = (json.loads((place / "evaluate/rouge.json").read_text()) for place in (tmp_path / "t", folder))
    assert joined["variants"] == whole["variants"]


def test_what_text_cannot_do_is_refused(
    finished, base: Path, corpus: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    config, _ = finished
    blind = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"perplexity": False})})
    with pytest.raises(ConfigError, match=r"evaluate\.perplexity: false leaves nothing to measure"):
        run_stage(blind, "evaluate", force=True)
    with pytest.raises(DataError, match="less text than a row"):
        (tmp_path / "few.txt").write_text("few words")
        run_stage(
            text_config(
                tmp_path,
                base,
                corpus,
                data={"kind": "text", "train_file": str(corpus / "train.txt"), "test_file": str(tmp_path / "few.txt")},
            ),
            "prepare",
        )
    tiny = {**tiny_config(tmp_path).model_dump(mode="json"), "data": {"kind": "text"}}
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps(tiny))
    refused = CliRunner().invoke(app, ["validate", str(file)])
    assert refused.exit_code == 2 and "data.kind" in refused.output and "makes dialogues" in refused.output
