"""`prepare` of rows to classify: a tiny BERT's, and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.data import tiny_pretrain
from hedgehog.pipeline.data.answer_corpus import ANSWERS
from hedgehog.pipeline.data.base_fingerprint import fingerprint_local_inputs
from hedgehog.pipeline.data.batches import collate
from hedgehog.pipeline.data.tiny_tokenizer import make_tokenizer
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import CheckpointError, ConfigError, DataError, ModelError
from hedgehog.pipeline.manifest import Manifest
from hedgehog.pipeline.metrics import Reporter
from hedgehog.pipeline.runner import run_stage
from hedgehog.pipeline.validation import validate_config

TINY = {
    "architecture": "bert",
    "num_train_dialogues": 40,
    "num_validation_dialogues": 5,
    "num_test_dialogues": 8,
    "vocab_size": 400,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 16,
    "pretrain_steps": 6,
    "pretrain_batch_size": 2,
}
ENGINE = {"precision": "float32", "device": "cpu", "cpu_threads": 1}


def tiny_config(root: Path, **fields: Any) -> RunConfig:
    data = {"kind": "classification", "max_length_tokens": 256}
    return RunConfig.model_validate(
        {"name": "t", "output_dir": str(root), "tiny": TINY, "engine": ENGINE, "data": data} | fields
    )


def prepare(config: RunConfig, **options: Any) -> tuple[Path, Manifest]:
    manifest = run_stage(config, "prepare", **options)
    return Path(config.output_dir) / config.name / "prepare", manifest


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    return prepare(tiny_config(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def base(tiny_run: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's, without the head for its own task."""
    folder = tmp_path_factory.mktemp("base") / "base_model"
    shutil.copytree(tiny_run[0] / "base_model", folder)
    tensors = load_file(folder / "model.safetensors")
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier.")}
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rows_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"examples_{split}.jsonl").read_text().splitlines()]


def test_tiny_makes_everything_a_run_needs(tiny_run: tuple[Path, Manifest]) -> None:
    folder, manifest = tiny_run
    assert set(manifest.artifacts) == {"base_model"} | {
        f"{kind}_{split}" for kind in ("tokens", "examples") for split in ("train", "validation", "test")
    }
    summary = manifest.summary
    assert summary["kind"] == "classification" and summary["label_names"] == list(ANSWERS)
    assert (summary["model_type"], summary["pad_id"], summary["num_positions"]) == ("bert", 0, 512)
    config = AutoConfig.from_pretrained(summary["base_model"])
    assert config.id2label == dict(enumerate(ANSWERS)) and config.num_labels == len(ANSWERS)
    assert config.label2id == {name: number for number, name in enumerate(ANSWERS)}
    model, loading = AutoModelForSequenceClassification.from_pretrained(summary["base_model"], output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(summary["tokenizer"])
    for name, size in (("train", 40), ("validation", 5), ("test", 8)):
        split, rows = TokenizedSplit.open(folder / f"tokens_{name}.safetensors"), rows_of(folder, name)
        figures = summary["splits"][name]
        assert len(split) == len(rows) == size == figures["used"] == sum(figures["label_counts"].values())
        assert list(figures["label_counts"]) == list(ANSWERS)
        for i, row in enumerate(rows):
            assert list(row) == ["id", "text", "second_text", "label", "seen_in_train"]
            tokens, border = split[i]
            expected = tokenizer(row["text"], row["second_text"])
            assert tokens.tolist() == expected["input_ids"]
            assert border == expected["token_type_ids"].count(0)
            assert split.labels is not None and ANSWERS[int(split.labels[i])] == row["label"]
    read = {row["text"] for name in ("train", "validation", "test") for row in rows_of(folder, name)}
    assert len(read) == 53, "no dialogue occurs twice"
    assert not (folder / "checkpoints" / "pretraining.safetensors").exists()
    assert model.config.max_position_embeddings == 512


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


def test_interrupted_pretraining_ends_with_the_same_bits(
    tiny_run: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, manifest = tiny_run
    monkeypatch.setattr(tiny_pretrain, "SAVE_EVERY_STEPS", 2)
    original = Reporter.step

    def stop(self: Reporter, step: int, total: int, **options: Any) -> None:
        original(self, step, total, **options)
        if step == 4:
            raise Stopped

    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", stop)
        with pytest.raises(Stopped):
            prepare(config)
    torch.rand(3)
    resumed_folder, resumed = prepare(config)
    same = {name: artifact.sha256 for name, artifact in resumed.artifacts.items()}
    assert same == {name: artifact.sha256 for name, artifact in manifest.artifacts.items()}
    weights = [load_file(f / "base_model" / "model.safetensors") for f in (folder, resumed_folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_padding_changes_nothing_of_what_is_learned(tiny_run: tuple[Path, Manifest]) -> None:
    """Pretraining's loss looks at the mask: a row's is the same beside a longer one."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_run[0] / "base_model")
    split = TokenizedSplit.open(tiny_run[0] / "tokens_train.safetensors")
    order = split.lengths.argsort().tolist()
    short, long = order[0], order[-1]
    alone = [tiny_pretrain._loss(model, collate(split, [[row]], 0, "row")).item() for row in (short, long)]
    together = tiny_pretrain._loss(model, collate(split, [[short], [long]], 0, "row")).item()
    assert together == pytest.approx(sum(alone) / 2, rel=1e-5)
    moved = {**collate(split, [[short], [long]], 0, "row")}
    moved["mask"] = torch.ones_like(moved["mask"])
    assert tiny_pretrain._loss(model, moved).item() != pytest.approx(together, rel=1e-5)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"Anna comes at {i}.", "label": i % 2} for i in range(start, start + count)]


def real_config(tmp_path: Path, base: Path | str, **data: Any) -> RunConfig:
    files = {
        "kind": "classification",
        "train_file": write(tmp_path / "train.jsonl", some_rows(20)),
        "test_file": write(tmp_path / "test.jsonl", some_rows(6, start=17)),
        "num_validation_examples": 4,
        "max_length_tokens": 64,
    }
    return RunConfig.model_validate(
        {
            "name": "r",
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(base)},
            "data": files | data,
            "engine": ENGINE,
        }
    )


def test_single_texts_with_numbers_are_not_the_bases_classes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = prepare(real_config(tmp_path, base))
    assert manifest.summary["label_names"] == ["0", "1"], "the base has fifteen classes: it was made for others"
    splits = manifest.summary["splits"]
    assert splits["train"]["used"] == 16 and splits["train"]["held_out"] == 4
    assert sum(splits["train"]["label_counts"].values()) == 16
    rows = rows_of(folder, "test")
    assert [list(row) for row in rows] == [["id", "text", "label", "seen_in_train"]] * 6
    assert [row["label"] for row in rows] == [str((17 + i) % 2) for i in range(6)]
    train = [row["text"] for row in rows_of(folder, "train")]
    assert [row["seen_in_train"] for row in rows] == [row["text"] in train for row in rows]
    split = TokenizedSplit.open(folder / "tokens_test.safetensors")
    assert torch.equal(split.prompt_lengths.long(), split.lengths)
    printed = capsys.readouterr().out
    for words in ("Rows of each label", "dropped: empty text", "  text also in train", "held out"):
        assert words in printed
    assert "summary" not in printed and "dialogue" not in printed


def test_other_labels_than_the_bases_are_told_of(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "label": ("noise", "news")[row["label"]]} for row in some_rows(20)]
    file = write(tmp_path / "named.jsonl", rows)
    _, manifest = prepare(real_config(tmp_path, base, train_file=file, test_file=file))
    assert manifest.summary["label_names"] == ["news", "noise"]
    told = " ".join(capsys.readouterr().out.split())
    assert "the base model's classes are 'today', 'tomorrow'" in told
    assert "10 more, those of the rows 'news', 'noise'" in told


def test_overlong_rows(base: Path, tmp_path: Path) -> None:
    long = [{"text": "Anna " * 90, "label": 0}]
    mixed = write(tmp_path / "mixed.jsonl", long + some_rows(3))
    only = write(tmp_path / "only.jsonl", long)
    _, manifest = prepare(real_config(tmp_path, base, test_file=mixed))
    test = manifest.summary["splits"]["test"]
    assert (test["rows"], test["dropped_overlong"], test["used"]) == (4, 1, 3)
    with pytest.raises(DataError, match=r"only\.jsonl: every test row is longer.*data\.overlong=truncate$"):
        prepare(real_config(tmp_path, base, test_file=only), force=True)
    _, manifest = prepare(real_config(tmp_path, base, test_file=mixed, overlong="truncate"), force=True)
    test = manifest.summary["splits"]["test"]
    assert (test["truncated"], test["dropped_overlong"], test["used"], test["length_max"]) == (1, 0, 4, 64)
    rows = [{"text": "Anna " * (90 + i), "label": 0} for i in range(30)]
    rows += [{"text": "Anna " * (1 + i), "label": 1} for i in range(30)]
    one_class = write(tmp_path / "one_class.jsonl", rows)
    with pytest.raises(DataError, match=r"one_class\.jsonl: every label of the rows used is '1'"):
        prepare(real_config(tmp_path, base, train_file=one_class), force=True)


def test_a_table_of_pairs(base: Path, tmp_path: Path) -> None:
    lines = ["id\tquestion\tsentence\tlabel"]
    lines += [f'{i}\tIs "{i}" even?\tIt is {i}.\t{("yes", "no")[i % 2]}' for i in range(20)]
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in ("train", "dev", "test"):
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    config = real_config(
        tmp_path,
        base,
        dataset=str(folder),
        train_file=None,
        test_file=None,
        text_field="question",
        second_text_field="sentence",
    )
    stage, manifest = prepare(config)
    assert manifest.summary["label_names"] == ["no", "yes"]
    assert rows_of(stage, "test")[3] == {
        "id": "3",
        "text": 'Is "3" even?',
        "second_text": "It is 3.",
        "label": "no",
        "seen_in_train": True,
    }
    before = fingerprint_local_inputs(config.model, config.data)
    (folder / "dev.tsv").write_text("\n".join(lines[:-1]) + "\n")
    after = fingerprint_local_inputs(config.model, config.data)
    assert [key for key in before if before[key] != after[key]] == [f"data.dataset {folder}"]


def test_base_and_kind_must_fit(base: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("llama")
    tiny = {name: value for name, value in TINY.items() if name != "architecture"}
    prepare(RunConfig.model_validate({"name": "l", "output_dir": str(root), "tiny": tiny, "engine": ENGINE}))
    llama = root / "l/prepare/base_model"
    for kind, model, message in (
        ("classification", llama, "data.kind: classification needs a BERT, and the base model is a Llama"),
        ("dialogues", base, "data.kind: dialogues, but the base model is a BERT, an encoder: set data.kind to class"),
        ("text", base, "data.kind: text, but the base model is a BERT, an encoder: set data.kind to classification"),
    ):
        rows = [{"dialogue": f"A: {i}", "summary": "so", **row} for i, row in enumerate(some_rows(20))]
        file = write(tmp_path / "all.jsonl", rows)
        config = real_config(tmp_path, model, kind=kind, train_file=file, test_file=file)
        with pytest.raises(ConfigError, match=message):
            prepare(config, force=True)
        yaml = tmp_path / "config.yaml"
        yaml.write_text(json.dumps(config.model_dump(mode="json")))
        (error,) = validate_config(yaml).errors
        assert error.startswith(message)


def test_a_class_without_training_rows_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "rows.jsonl", [*some_rows(12), {"text": "Anna " * 90, "label": 2}])
    short = write(tmp_path / "short.jsonl", [*some_rows(4), {"text": "Anna", "label": 2}])
    prepare(real_config(tmp_path, base, train_file=file, validation_file=short, test_file=short))
    told = " ".join(capsys.readouterr().out.split())
    assert "warning: no training row is left of 2: held out" in told


def test_pairs_take_two_token_types(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    fields = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(fields | {"type_vocab_size": 1}))
    tensors = load_file(tmp_path / "base/model.safetensors")
    name = "bert.embeddings.token_type_embeddings.weight"
    save_file({**tensors, name: tensors[name][:1].clone()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    prepare(real_config(tmp_path, tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"data\.second_text_field: other, but the base model tells no"):
        prepare(real_config(tmp_path, tmp_path / "base", second_text_field="other"), force=True)


def test_a_tokenizer_of_another_family_is_refused(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "gpt2"
    other.mkdir()
    make_tokenizer("gpt2", ["some words of no importance"] * 20, 380, other)
    config = real_config(tmp_path, base)
    config = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": str(other)})})
    with pytest.raises(ModelError, match=r"does not put \[CLS\] and \[SEP\]"):
        prepare(config)


def test_a_base_without_a_head_must_be_finetuned(base: Path, tmp_path: Path, tiny_run: tuple[Path, Manifest]) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text(json.dumps(real_config(tmp_path, base).model_dump(mode="json")))
    assert validate_config(yaml).errors == []
    variant = 'variants={"plain": {"overrides": {"finetune.enabled": false}}}'
    (error,) = validate_config(yaml, [variant]).errors
    assert error.startswith("variants.plain.overrides.finetune.enabled") and "has no head for classes" in error
    (error,) = validate_config(yaml, ["finetune.enabled=false"]).errors
    assert error.startswith("finetune.enabled") and "false, but " in error
    assert validate_config(yaml, [variant, f"model.base={tiny_run[0] / 'base_model'}"]).errors == []


def test_a_head_that_names_no_classes_may_mean_others(
    base: Path, tmp_path: Path, tiny_run: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run[0] / "base_model", tmp_path / "base")
    file = tmp_path / "base/config.json"
    fields = json.loads(file.read_text())
    del fields["id2label"], fields["label2id"]
    rows = [{"text": f"Is it {name}? {i}", "label": name} for i, name in enumerate(ANSWERS * 3)]
    rows = write(tmp_path / "rows.jsonl", rows)
    files = {"train_file": rows, "validation_file": rows, "test_file": rows}
    for architectures, is_told in ((fields["architectures"], True), (["BertModel"], False)):
        names = {str(i): f"LABEL_{i}" for i in range(len(ANSWERS))}
        file.write_text(json.dumps(fields | {"architectures": architectures, "id2label": names}))
        prepare(real_config(tmp_path, tmp_path / "base", **files), force=True)
        told = " ".join(capsys.readouterr().out.split())
        assert ("the rows' are numbered by the alphabet: 'at eight'" in told) == is_told


def test_validate_reads_the_rows(base: Path, tmp_path: Path) -> None:
    config = real_config(tmp_path, base)
    yaml = tmp_path / "config.yaml"
    yaml.write_text(json.dumps(config.model_dump(mode="json")))
    report = validate_config(yaml)
    assert report.errors == []
    assert report.batches[0].num_rows == 16
    write(tmp_path / "test.jsonl", [{"text": "x", "label": 7}])
    (error,) = validate_config(yaml).errors
    assert "test.jsonl:1: the test label 7 does not occur in train (0, 1)" in error
    write(tmp_path / "test.jsonl", [{"text": "x", "label": None}])
    (error,) = validate_config(yaml).errors
    assert error.startswith("data.test_file: ") and "test.jsonl:1: field 'label' has no label" in error
    (error,) = validate_config(yaml, ["data.max_length_tokens=600", f"data.test_file={tmp_path}/train.jsonl"]).errors
    assert "data.max_length_tokens: 600, but the base model has 512 positions: give at most 512." in error


def test_a_changed_label_field_is_another_prepare(base: Path, tmp_path: Path) -> None:
    config = real_config(tmp_path, base)
    prepare(config)
    with pytest.raises(CheckpointError, match=r"data\.label_field"):
        prepare(real_config(tmp_path, base, label_field="gold"))
