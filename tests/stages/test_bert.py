"""The stages on a BERT that tells classes: what holds for a Llama holds here, with a head that learns along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hedgehog.pipeline.answers import open_variants
from hedgehog.pipeline.classification_head import new_head
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.data.tiny import CORPUS_FIELDS
from hedgehog.pipeline.data.tokenize import load_prepared_tokenizer
from hedgehog.pipeline.errors import CheckpointError, ConfigError, ModelError
from hedgehog.pipeline.modeling.load_base import load_base
from hedgehog.pipeline.report.writing import write_report
from hedgehog.pipeline.runner import merge_layers, run_pipeline, run_stage
from hedgehog.stages import export

MAPS, ADAPTER, HEAD = (
    "distill/feature_maps.safetensors",
    "finetune/adapter/adapter_model.safetensors",
    "finetune/head.safetensors",
)
Run = Any


@pytest.fixture(scope="module")
def finished(new_run: Callable[..., Run]) -> Run:
    """An uninterrupted run of both training stages."""
    run = new_run("bert")
    run.stage("distill")
    run.stage("finetune")
    return run


def test_maps_adapters_and_head_learn(finished: Run, new_run: Callable[..., Run]) -> None:
    untrained = new_run("bert", distill__enabled=False).stage("distill").summary
    assert finished.stage("distill").summary["kl_mean"] < untrained["kl_mean"]
    # 3 layers, rank 4: A and B of four square modules, two maps of 4 heads of 8 x 8; pooler and two classes
    of_layers = 3 * (4 * 4 * 64 + 2 * 4 * 8 * 8)
    assert finished.stage("finetune").summary["trained_weights"] == of_layers + 32 * 33 + 2 * 33
    moved = [name for name, w in finished.tensors(ADAPTER).items() if "lora_B" in name and w.abs().sum() > 0]
    assert len(moved) == 12
    base = load_file(finished.root / "prepare/base_model/model.safetensors")
    head = finished.tensors(HEAD)
    assert head.keys() == {f"{m}.{k}" for m in ("bert.pooler.dense", "classifier") for k in ("weight", "bias")}
    assert all(not torch.equal(tensor, base[name]) for name, tensor in head.items())


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_a_resumed_run_ends_with_the_same_bits(
    zero_stage: int, new_run: Callable[..., Run], interrupt: Callable[..., None]
) -> None:
    """With dropout of hidden states, which BERT brings along, and a head that begins at random."""
    whole, run = (new_run("bert without head", engine__zero_stage=zero_stage) for _ in range(2))
    for stage, files in (("distill", (MAPS,)), ("finetune", (MAPS, ADAPTER, HEAD))):
        whole.stage(stage)
        interrupt(run, stage)
        torch.rand(7)  # whatever else drew random numbers in between
        assert run.stage(stage).num_resumes == 1
        run.assert_same_tensors(whole, *files)
        assert run.metrics(stage) == whole.metrics(stage)


def test_layers_trained_apart_are_the_same_to_the_bit(finished: Run, new_run: Callable[..., Run]) -> None:
    run = new_run("bert")
    for layers in ("0,2", "1"):
        run.changed(distill__layers=layers).stage("distill")
    merge_layers(run.config)
    run.assert_same_tensors(finished, MAPS)


def test_a_subset_on_kept_hidden_states_learns_the_same(new_run: Callable[..., Run]) -> None:
    """But for the last bits of products, which depend on the shape of the batch that they were computed in."""
    runs = [new_run("bert", distill__layers="2", distill__cache_hidden_states=cached) for cached in (False, True)]
    for run in runs:
        run.stage("distill")
    plain, kept = (run.tensors("distill/layers-2/feature_maps.safetensors") for run in runs)
    for name, tensor in plain.items():
        torch.testing.assert_close(kept[name], tensor, rtol=1e-3, atol=1e-5)


def test_two_processes_under_zero_3_learn_the_same(new_run: Callable[..., Run], launch: Callable[..., Any]) -> None:
    """Without dropout, whose masks each process draws for itself."""
    alone, together = (new_run("bert without dropout", engine__zero_stage=stage) for stage in (0, 3))
    alone.stage("distill")
    alone.stage("finetune")
    launch([(together, "distill", None), (together, "finetune", None)])
    assert together.losses("distill") == pytest.approx(alone.losses("distill"), rel=1e-6)
    assert together.losses("finetune") == pytest.approx(alone.losses("finetune"), rel=1e-5)
    for name, tensor in together.tensors(HEAD).items():
        torch.testing.assert_close(tensor, alone.tensors(HEAD)[name], rtol=1e-4, atol=1e-5)


def test_micro_batches_change_nothing(new_run: Callable[..., Run]) -> None:
    """The loss is a mean over rows, however long they are."""
    runs = [new_run("bert without dropout", finetune__micro_batch_size=size) for size in (1, 4)]
    for run in runs:
        run.stage("distill")
        run.stage("finetune")
    assert runs[0].losses("finetune") == pytest.approx(runs[1].losses("finetune"), rel=1e-4)


def test_output_distillation_and_sampled_queries_train(finished: Run, new_run: Callable[..., Run]) -> None:
    untrained = new_run("bert", distill__enabled=False).stage("distill").summary["kl_mean"]
    for settings in ({"output_mse_weight": 1.0}, {"query_fraction": 0.5}):
        run = new_run("bert", **{f"distill__{name}": value for name, value in settings.items()})
        assert run.stage("distill").summary["kl_mean"] < untrained
        assert not torch.equal(next(iter(run.tensors(MAPS).values())), next(iter(finished.tensors(MAPS).values())))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_trains_its_head_whole(quantization: str, new_run: Callable[..., Run], finished: Run) -> None:
    run = new_run("bert", model__quantization=quantization)
    kl = run.stage("distill").summary["kl_mean"]
    assert kl == pytest.approx(finished.stage("distill").summary["kl_mean"], rel=0.3)
    run.stage("finetune")
    assert {tensor.dtype for tensor in run.tensors(HEAD).values()} == {torch.float32}


def test_a_frozen_base_in_bfloat16_trains_its_head_in_float32(new_run: Callable[..., Run]) -> None:
    run = new_run("bert", engine__precision="bfloat16")
    run.stage("distill")
    run.stage("finetune")
    head = run.tensors(HEAD)["classifier.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head, head.bfloat16().float())


def test_a_head_that_begins_at_random_is_that_of_its_seed(new_run: Callable[..., Run], tmp_path: Path) -> None:
    folder = new_run("bert without head").root / "prepare/base_model"
    state = torch.random.get_rng_state()
    loads = [load_base(folder, dtype="float32", label_names=("no", "yes"), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = (base.classifier.weight for base in loads)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(new_head(base) for base in loads)
    pooler = load_file(folder / "model.safetensors")["bert.pooler.dense.weight"]
    assert torch.equal(loads[0].bert.pooler.dense.weight, pooler), "what the base has stays"
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".pooler." not in n}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    without_pooler = load_base(tmp_path, dtype="float32", label_names=("no", "yes"), seed=1)
    assert torch.equal(without_pooler.classifier.weight, first)
    assert without_pooler.bert.pooler.dense.weight.detach().std() == pytest.approx(0.3, rel=0.1)


def test_a_head_that_begins_at_random_is_told(new_run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    for family, told in (("bert without head", True), ("bert", False)):
        run = new_run(family, distill__max_steps=1, finetune__max_steps=1)
        run.stage("distill")
        run.stage("finetune")
        assert ("classifier: not among the base's weights" in " ".join(capsys.readouterr().out.split())) == told


def test_a_head_for_other_classes_is_refused(new_run: Callable[..., Run]) -> None:
    folder = new_run("bert").root / "prepare/base_model"
    assert not new_head(load_base(folder, dtype="float32", label_names=("a", "b")))
    with pytest.raises(ModelError, match=r"its head tells other classes than the 3 of the data \(a, b, c\)"):
        load_base(folder, dtype="float32", label_names=("a", "b", "c"))


TINY = {
    "architecture": "bert",
    "num_train_dialogues": 300,
    "num_validation_dialogues": 20,
    "num_test_dialogues": 20,
    "vocab_size": 500,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 64,
    "pretrain_steps": 6,
    "pretrain_batch_size": 4,
}


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., RunConfig]) -> Path:
    """All stages of a built-in BERT, softmax attention and the untouched base beside it."""
    root = tmp_path_factory.mktemp("tiny")
    run_pipeline(a_tiny_bert(tiny_config, root))
    return root / "g"


def a_tiny_bert(tiny_config: Callable[..., RunConfig], root: Path, **sections: Any) -> RunConfig:
    data = {"kind": "classification", "max_length_tokens": 256}
    variants = {
        "softmax": {"overrides": {"model.attention": "softmax"}},
        "base": {"overrides": {"model.attention": "softmax", "finetune.enabled": False}},
    }
    return tiny_config(root, tiny=TINY, **{"data": data, "variants": variants, **sections})


def test_the_whole_pipeline(tiny_run: Path) -> None:
    scores = json.loads((tiny_run / "evaluate/rouge.json").read_text())
    assert scores["kind"] == "classification" and set(scores["variants"]) == {"main", "softmax", "base"}
    drift = json.loads((tiny_run / "export/drift.json").read_text())
    assert drift["logits_max_abs"] < 1e-4 and drift["equal_argmax_share"] == 1 and drift["num_positions"] == 20
    assert drift["exported"]["model_class"] == "HedgehogBertForSequenceClassification"
    card = (tiny_run / "export/model/README.md").read_text()
    assert "Hedgehog-BERT" in card and "AutoModelForSequenceClassification" in card
    assert "Llama" not in card and "generate(" not in card and "summar" not in card
    names = {file.name for file in (tiny_run / "export/model").iterdir()}
    assert "modeling_hedgehog_bert.py" in names and "generation_config.json" not in names


def test_the_export_tells_what_evaluate_recorded(tiny_run: Path) -> None:
    """Through transformers' own tokenizer and padding, by name."""
    folder = tiny_run / "export/model"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
    examples = [json.loads(line) for line in (tiny_run / "prepare/examples_test.jsonl").read_text().splitlines()]
    recorded = [json.loads(line) for line in (tiny_run / "evaluate/predictions/main.jsonl").read_text().splitlines()]
    pairs = [[row["text"] for row in examples], [row["second_text"] for row in examples]]
    logits = model(**tokenizer(*pairs, padding=True, return_tensors="pt")).logits
    found = [model.config.id2label[index] for index in logits.argmax(1).tolist()]
    by_index = {row["index"]: row for row in recorded}
    assert found == [by_index[index]["prediction"] for index in range(20)]
    assert tokenizer("a [SEP] b").input_ids.count(tokenizer.sep_token_id) == 1, "as prepare reads it"
    cut = tokenizer("see you " * 3000, truncation=True, return_tensors="pt")
    assert cut.input_ids.shape == (1, 512) and model(**cut).logits.isfinite().all()
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor([model.config.label2id[row["label"]] for row in examples]), reduction="none"
    )
    assert losses.tolist() == pytest.approx([by_index[index]["loss_nats"] for index in range(20)], rel=1e-4, abs=1e-5)


def test_a_softmax_variant_is_exported_as_a_plain_bert(tiny_run: Path, tiny_config: Callable[..., RunConfig]) -> None:
    run_stage(a_tiny_bert(tiny_config, tiny_run.parent), "export", variant="softmax")
    folder = tiny_run / "variants/softmax/export/model"
    assert type(AutoModelForSequenceClassification.from_pretrained(folder)).__name__ == "BertForSequenceClassification"
    assert not list(folder.glob("*.py"))


def test_the_report_says_what_was_made(tiny_run: Path) -> None:
    page = write_report(tiny_run).read_text(encoding="utf-8")
    assert "Hedgehog-BERT conversion" in page and "Llama" not in page and "ROUGE" not in page


def test_the_exported_tokenizer_is_held_to_prepares_tokens(
    tiny_run: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts as users have them: one is cut, others speak of [SEP] and [CLS]."""
    texts = ("a [SEP] b", "see you at 5 " * 40, "[CLS]", "no")
    rows = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in zip(texts, "0101", strict=True))
    (tmp_path / "rows.jsonl").write_text(rows)
    files = {f"{split}_file": str(tmp_path / "rows.jsonl") for split in ("train", "validation", "test")}
    shutil.copytree(tiny_run / "prepare/base_model", tmp_path / "base")
    fields = json.loads((tmp_path / "base/config.json").read_text())
    fields |= {"id2label": {"0": "0", "1": "1"}, "label2id": {"0": 0, "1": 1}}
    (tmp_path / "base/config.json").write_text(json.dumps(fields))
    tensors = load_file(tmp_path / "base/model.safetensors")
    tensors |= {f"classifier.{name}": tensors[f"classifier.{name}"][:2].clone() for name in ("weight", "bias")}
    save_file(tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    config = a_tiny_bert(
        tiny_config,
        tmp_path,
        model={"base": str(tmp_path / "base"), "attention": "softmax"},
        data={"kind": "classification", "max_length_tokens": 64, "overlong": "truncate", **files},
        finetune={"enabled": False},
        variants={},
    ).model_copy(update={"tiny": None})
    for stage in ("prepare", "distill", "finetune"):
        run_stage(config, stage)
    assert json.loads((tmp_path / "g/prepare/manifest.json").read_text())["summary"]["splits"]["test"]["truncated"] == 1

    def with_a_word_more(*arguments: Any) -> Any:
        tokenizer = load_prepared_tokenizer(*arguments)
        tokenizer.add_tokens(["you at"])  # of the row that is cut
        return tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(export, "load_prepared_tokenizer", with_a_word_more)
        with pytest.raises(ModelError, match="does not give the tokens that prepare gave"):
            run_stage(config, "export")
    shorter = config.model_copy(update={"data": config.data.model_copy(update={"max_length_tokens": 32})})
    assert run_stage(shorter, "export").summary["drift"]["num_positions"] == 4, "prepare's length counts, not today's"


def test_a_run_that_classifies_generates_nothing(tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="tells classes"):
        open_variants(str(tiny_run))


def test_a_torn_head_is_found(tiny_run: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "g")
    with open(tmp_path / "g/finetune/head.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="head"):
        run_stage(a_tiny_bert(tiny_config, tmp_path), "export", force=True)


def test_a_base_without_a_head_is_not_scored_untrained(
    tiny_run: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    made, fields = tiny_run / "prepare", CORPUS_FIELDS
    base = tmp_path / "base"
    shutil.copytree(made / "base_model", base)
    tensors = {n: t for n, t in load_file(base / "model.safetensors").items() if not n.startswith("classifier.")}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    files = {f"{split}_file": str(made / f"corpus/{split}.jsonl") for split in ("train", "validation", "test")}
    config = a_tiny_bert(
        tiny_config,
        tmp_path / "runs",
        model={"base": str(base)},
        data={"kind": "classification", "max_length_tokens": 256, **fields, **files},
    ).model_copy(update={"tiny": None})
    with pytest.raises(ModelError, match="has no head for these classes"):
        run_pipeline(config)


def test_a_head_for_another_task_is_refused_before_anything_is_trained(
    tiny_run: Path, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    rows = "".join(json.dumps({"text": f"it is {word}", "label": word}) + "\n" for word in ("good", "bad"))
    (tmp_path / "rows.jsonl").write_text(rows)
    file = str(tmp_path / "rows.jsonl")
    data = {"kind": "classification", "train_file": file, "validation_file": file, "test_file": file}
    base = str(tiny_run / "prepare/base_model")
    config = a_tiny_bert(tiny_config, tmp_path / "runs", model={"base": base}, data=data).model_copy(
        update={"tiny": None}
    )
    with pytest.raises(ModelError, match=r"its head tells other classes than the 2 of the data \(bad, good\)"):
        run_stage(config, "prepare")
