"""The stages on a GPT-2: what holds for a Llama holds here, with dropout in the base and turned projections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.errors import ConfigError, HedgehogError
from hedgehog.pipeline.report.writing import write_report
from hedgehog.pipeline.runner import merge_layers, run_pipeline, run_stage
from hedgehog.pipeline.validation import validate_config

MAPS, ADAPTER = "distill/feature_maps.safetensors", "finetune/adapter/adapter_model.safetensors"
Run = Any


@pytest.fixture(scope="module")
def finished(new_run: Callable[..., Run]) -> Run:
    """An uninterrupted run of both training stages."""
    run = new_run("gpt2")
    run.stage("distill")
    run.stage("finetune")
    return run


def test_maps_and_adapters_learn(finished: Run, new_run: Callable[..., Run]) -> None:
    untrained = new_run("gpt2", distill__enabled=False).stage("distill").summary
    assert finished.stage("distill").summary["kl_mean"] < untrained["kl_mean"]
    # 3 layers, rank 4: A and B of c_attn (32 x 96) and attn.c_proj (32 x 32), and two maps of 4 heads of 8 x 8
    assert finished.stage("finetune").summary["trained_weights"] == 3 * (4 * (128 + 64) + 2 * 4 * 8 * 8)
    moved = [name for name, w in finished.tensors(ADAPTER).items() if "lora_B" in name and w.abs().sum() > 0]
    assert len(moved) == 6
    config = json.loads((finished.root / "finetune/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_proj", "c_attn"] and config["fan_in_fan_out"] is True


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_resumed_run_ends_with_the_same_bits(
    zero_stage: int, new_run: Callable[..., Run], interrupt: Callable[..., None]
) -> None:
    """With dropout in embeddings and residuals, which GPT-2 brings along."""
    whole, run = (new_run("gpt2", engine__zero_stage=zero_stage) for _ in range(2))
    for stage, files in (("distill", (MAPS,)), ("finetune", (MAPS, ADAPTER))):
        whole.stage(stage)
        interrupt(run, stage)
        torch.rand(7)  # whatever else drew random numbers in between
        assert run.stage(stage).num_resumes == 1
        run.assert_same_tensors(whole, *files)
        assert run.metrics(stage) == whole.metrics(stage)


def test_layers_trained_apart_are_the_same_to_the_bit(finished: Run, new_run: Callable[..., Run]) -> None:
    run = new_run("gpt2")
    for layers in ("0,2", "1"):
        run.changed(distill__layers=layers).stage("distill")
    merge_layers(run.config)
    run.assert_same_tensors(finished, MAPS)


def test_two_processes_under_zero_3_learn_the_same(new_run: Callable[..., Run], launch: Callable[..., Any]) -> None:
    """Without dropout, whose masks each process draws for itself."""
    alone, together = (new_run("gpt2 without dropout", engine__zero_stage=stage) for stage in (0, 3))
    alone.stage("distill")
    alone.stage("finetune")
    launch([(together, "distill", None), (together, "finetune", None)])
    assert together.losses("distill") == pytest.approx(alone.losses("distill"), rel=1e-6)
    assert together.losses("finetune") == pytest.approx(alone.losses("finetune"), rel=1e-5)
    assert {n: t.shape for n, t in together.tensors(ADAPTER).items()} == {
        n: t.shape for n, t in alone.tensors(ADAPTER).items()
    }


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_distills_and_finetunes(quantization: str, new_run: Callable[..., Run], finished: Run) -> None:
    run = new_run("gpt2", model__quantization=quantization)
    kl = run.stage("distill").summary["kl_mean"]
    assert kl == pytest.approx(finished.stage("distill").summary["kl_mean"], rel=0.3)
    assert run.stage("finetune").summary["validation_loss"] > 0


@pytest.mark.parametrize(("stage", "near"), [("distill", 1e-5), ("finetune", 1e-4)])
def test_packed_rows_have_the_loss_of_their_own(stage: str, near: float, new_run: Callable[..., Run]) -> None:
    """All rows in one step, each alone or joined: positions begin again at each one's start, and none sees another."""
    everything = {"data__max_length_tokens": 128, f"{stage}__max_steps": 1, f"{stage}__gradient_clip": None}
    alone = {f"{stage}__global_batch_size": 12, f"{stage}__micro_batch_size": 1}
    joined = {f"{stage}__packing": True, f"{stage}__global_batch_size": 2, f"{stage}__micro_batch_size": 2}
    rows, packed = (new_run("gpt2 without dropout", **everything, **batches) for batches in (alone, joined))
    for run in (rows, packed):
        if stage == "finetune":
            run.stage("distill")
        run.stage(stage)
    assert rows.metrics(stage)[0]["tokens"] == packed.metrics(stage)[0]["tokens"]
    assert packed.losses(stage) == pytest.approx(rows.losses(stage), rel=near)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., RunConfig]) -> Path:
    """All stages of a built-in GPT-2, softmax attention beside it."""
    root = tmp_path_factory.mktemp("tiny")
    run_pipeline(tiny_config(root))
    return root / "g"


def test_the_whole_pipeline(tiny_run: Path) -> None:
    prepare = json.loads((tiny_run / "prepare/manifest.json").read_text())["summary"]
    assert (prepare["model_type"], prepare["num_positions"]) == ("gpt2", 1024)
    tokenizer = AutoTokenizer.from_pretrained(prepare["tokenizer"])
    assert type(tokenizer).__name__ == "GPT2Tokenizer" and tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    scores = json.loads((tiny_run / "evaluate/rouge.json").read_text())
    assert set(scores["variants"]) == {"main", "softmax"}
    drift = json.loads((tiny_run / "export/drift.json").read_text())
    assert drift["logits_max_abs"] < 1e-3 and drift["equal_generated_share"] == 1
    assert drift["exported"]["model_class"] == "HedgehogGPT2LMHeadModel"
    card = (tiny_run / "export/model/README.md").read_text()
    assert "A Hedgehog-GPT-2: a small GPT-2 pretrained on generated dialogues" in card
    assert "on c_attn, attn.c_proj; merged in float32" in card and "Llama" not in card
    names = {file.name for file in (tiny_run / "export/model").iterdir()}
    assert "modeling_hedgehog_gpt2.py" in names and "modeling_hedgehog_llama.py" not in names


def test_the_export_pads_with_its_end(tiny_run: Path) -> None:
    """A GPT-2 has no other special token; a plain word would stand behind each shorter answer of a batch."""
    folder = tiny_run / "export/model"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    texts = ["Ann: Lunch?", "Bob: Where do we meet on Friday, and when, and who brings bread?"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [len(tokenizer(text).input_ids) for text in texts]
    together = model.generate(**batch, max_new_tokens=5, min_new_tokens=5)
    for text, row in zip(texts, together, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5, min_new_tokens=5)[0]
        assert torch.equal(row[-5:], alone[-5:])


def test_a_softmax_variant_is_exported_as_a_plain_gpt2(tiny_run: Path, tiny_config: Callable[..., RunConfig]) -> None:
    run_stage(tiny_config(tiny_run.parent), "export", variant="softmax")
    folder = tiny_run / "variants/softmax/export/model"
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), GPT2LMHeadModel)
    assert not list(folder.glob("*.py"))
    drift = json.loads((folder.parent / "drift.json").read_text())
    assert drift["equal_generated_share"] == 1


def test_the_report_says_what_was_made(tiny_run: Path) -> None:
    page = write_report(tiny_run).read_text(encoding="utf-8")
    assert "Hedgehog-GPT-2 conversion" in page and "a small GPT-2 pretrained" in page and "Llama" not in page


def test_more_new_tokens_than_positions_are_refused_before_training(
    tiny_run: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    wanted = tiny_config(tmp_path, evaluate={"max_new_tokens": 1000})
    with pytest.raises(ConfigError, match=r"longest test prompt has \d+ tokens, with 1000 new ones .* 1024 positions"):
        run_stage(wanted, "prepare")
    later = tiny_config(tiny_run.parent, evaluate={"max_new_tokens": 1000, "batch_size": 3})
    with pytest.raises(ConfigError, match=r"evaluate\.max_new_tokens=\d+, or a lower data\.max_length_tokens"):
        run_stage(later, "evaluate", force=True)
    hopeless = tiny_config(tmp_path, evaluate={"max_new_tokens": 1024}).model_dump(mode="json")
    (tmp_path / "hopeless.yaml").write_text(json.dumps(hopeless))
    report = validate_config(tmp_path / "hopeless.yaml")
    assert any("evaluate.max_new_tokens" in error and "1024 positions" in error for error in report.errors)
    with pytest.raises(HedgehogError, match=r"max_length_tokens: 2000, but the base model has 1024 positions"):
        run_stage(tiny_config(tmp_path, data={"max_length_tokens": 2000}), "prepare", force=True)
