from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import LlamaConfig

from hedgehog.pipeline.config import DataConfig, RunConfig
from hedgehog.pipeline.data import tiny_pretrain
from hedgehog.pipeline.data.base_fingerprint import fingerprint_base
from hedgehog.pipeline.data.dialogue_corpus import generate_dialogues
from hedgehog.pipeline.data.sources import resolve_splits
from hedgehog.pipeline.data.tiny_tokenizer import save_tokenizer, train_tokenizer
from hedgehog.pipeline.data.tokenize import load_prepared_tokenizer, load_tokenizer
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import CheckpointError, ConfigError, DataError, ModelError
from hedgehog.pipeline.manifest import Manifest, StageInput
from hedgehog.pipeline.metrics import Reporter
from hedgehog.pipeline.rouge import UNSCORABLE
from hedgehog.pipeline.runner import run_stage

TINY = {
    "num_train_dialogues": 30,
    "num_validation_dialogues": 5,
    "num_test_dialogues": 6,
    "vocab_size": 512,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "pretrain_steps": 6,
    "pretrain_batch_size": 2,
}


def tiny_config(output_dir: Path, **fields) -> RunConfig:
    engine = {"precision": "float32", "device": "cpu", "cpu_threads": 1}
    return RunConfig.model_validate(
        {"name": "t", "output_dir": str(output_dir), "tiny": TINY, "engine": engine} | fields
    )


def prepare(config: RunConfig, **options) -> tuple[Path, Manifest]:
    manifest = run_stage(config, "prepare", **options)
    return Path(config.output_dir) / config.name / "prepare", manifest


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[Path, Manifest]:
    return prepare(tiny_config(tmp_path_factory.mktemp("tiny")))


def test_tiny_makes_everything_a_run_needs(tiny_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, manifest = tiny_run
    assert manifest.status == "done"
    assert set(manifest.artifacts) == {"base_model"} | {
        f"{kind}_{split}" for kind in ("tokens", "examples") for split in ("train", "validation", "test")
    }
    base = manifest.summary["base_model"]
    model = AutoModelForCausalLM.from_pretrained(base)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_key_value_heads == 1
    tokenizer = AutoTokenizer.from_pretrained(manifest.summary["tokenizer"])
    assert manifest.summary["pad_id"] not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for name, size in (("train", 30), ("validation", 5), ("test", 6)):
        split = TokenizedSplit.open(folder / f"tokens_{name}.safetensors")
        rows = [json.loads(line) for line in (folder / f"examples_{name}.jsonl").read_text().splitlines()]
        assert len(split) == len(rows) == size == manifest.summary["splits"][name]["used"]
        for i, row in enumerate(rows):
            tokens, prompt_length = split[i]
            assert tokens[:prompt_length].tolist() == tokenizer(row["prompt"]).input_ids
            assert tokenizer.decode(tokens[prompt_length:-1]) == row["summary"]
            assert row["seen_in_train"] is False
    assert not (folder / "checkpoints" / "pretraining.safetensors").exists()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_interrupted_pretraining_ends_with_the_same_bits(tiny_run, tmp_path, monkeypatch, stop_at):
    folder, manifest = tiny_run
    monkeypatch.setattr(tiny_pretrain, "SAVE_EVERY_STEPS", 2)
    original = Reporter.step

    def stop(self, step, total, **options):
        original(self, step, total, **options)
        if step == stop_at:
            raise Stopped

    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", stop)
        with pytest.raises(Stopped):
            prepare(config)
    resumed_folder = tmp_path / "t" / "prepare"
    assert not (resumed_folder / "base_model").exists()
    # What a kill in the middle of writing would leave behind.
    (resumed_folder / "base_model.partial").mkdir(exist_ok=True)
    (resumed_folder / "base_model.partial" / "config.json").write_text("{")
    first_steps = []

    def watch(self, step, total, **options):
        first_steps.append(step)
        original(self, step, total, **options)

    monkeypatch.setattr(Reporter, "step", watch)
    _, resumed = prepare(config)
    assert first_steps[0] == max(stop_at - 1, 0) // 2 * 2 + 1
    same = {name: artifact.sha256 for name, artifact in resumed.artifacts.items()}
    assert same == {name: artifact.sha256 for name, artifact in manifest.artifacts.items()}
    weights = [load_file(f / "base_model" / "model.safetensors") for f in (folder, resumed_folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_torn_or_foreign_checkpoint_starts_pretraining_anew(tiny_run, tmp_path):
    config = tiny_config(tmp_path)
    checkpoint = tmp_path / "t" / "prepare" / "checkpoints" / "pretraining.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"\x10\x00\x00\x00torn")
    _, manifest = prepare(config)
    assert manifest.artifacts["base_model"].sha256 == tiny_run[1].artifacts["base_model"].sha256


def test_a_finished_prepare_does_nothing_and_a_changed_one_is_refused(tiny_run):
    folder, manifest = tiny_run
    output_dir = folder.parent.parent
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert run_stage(tiny_config(output_dir), "prepare") == manifest
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    with pytest.raises(CheckpointError, match="seed"):
        run_stage(tiny_config(output_dir, seed=5), "prepare")


@pytest.fixture(scope="module")
def base(tiny_run) -> Path:
    return tiny_run[0] / "base_model"


def write_rows(path: Path, count: int, start: int = 0) -> str:
    rows = [{"dialogue": f"Ann: {i}?\r\nBob: {i}!", "summary": f"It is {i}."} for i in range(start, start + count)]
    path.write_text(json.dumps(rows))
    return str(path)


def real_config(tmp_path: Path, base: Path | str, **data) -> RunConfig:
    files = {
        "train_file": write_rows(tmp_path / "train.json", 20),
        "test_file": write_rows(tmp_path / "test.json", 6, start=17),
        "num_validation_examples": 4,
    }
    return RunConfig.model_validate(
        {
            "name": "r",
            "output_dir": str(tmp_path / "runs"),
            "model": {"base": str(base)},
            "data": files | data,
            "engine": {"precision": "float32", "device": "cpu", "cpu_threads": 1},
        }
    )


def test_local_model_and_files(base, tmp_path, capsys):
    folder, manifest = prepare(real_config(tmp_path, base))
    assert manifest.summary["base_model"] == manifest.summary["tokenizer"] == str(base)
    described = json.loads((folder / "base_model.json").read_text())
    assert described["path"] == str(base)
    assert described["fingerprint"] == manifest.summary["base_fingerprint"]
    splits = manifest.summary["splits"]
    assert splits["train"]["used"] == 16 and splits["train"]["held_out"] == 4
    assert splits["validation"]["used"] == 4
    assert splits["test"]["used"] == 6
    rows = [json.loads(line) for line in (folder / "examples_test.jsonl").read_text().splitlines()]
    train = [json.loads(line)["dialogue"] for line in (folder / "examples_train.jsonl").read_text().splitlines()]
    assert [row["seen_in_train"] for row in rows] == [row["dialogue"] in train for row in rows]
    assert splits["test"]["seen_in_train"] == sum(row["seen_in_train"] for row in rows)
    assert all("\r" not in row["prompt"] for row in rows)
    printed = capsys.readouterr().out
    for words in ("rows read", "95th percentile", "dropped: too long", "held out", str(splits["train"]["tokens"])):
        assert words in printed


def test_summaries_that_rouge_cannot_score_are_told_of_before_the_hours_of_training(base, tmp_path, capsys):
    config = real_config(tmp_path, base)
    file = Path(config.data.test_file)
    rows = json.loads(file.read_text())
    rows[2]["summary"] = "Цем не придёт."
    file.write_text(json.dumps(rows))
    prepare(config)
    assert f"1 of {len(rows)} test summaries {UNSCORABLE}" in " ".join(capsys.readouterr().out.split())


def test_the_base_fingerprint_notices_other_weights(base, tmp_path):
    first = prepare(real_config(tmp_path, base))[1]
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "notes.txt").write_text("not part of the model")
    assert (
        prepare(real_config(tmp_path, other), force=True)[1].summary["base_fingerprint"]
        == (first.summary["base_fingerprint"])
    )
    config = LlamaConfig.from_pretrained(base)
    newer = LlamaConfig.from_dict(config.to_dict() | {"transformers_version": "99.0", "new_in_99": True})
    assert fingerprint_base(str(other), None, newer) == fingerprint_base(str(base), None, config)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    changed = prepare(real_config(tmp_path, other), force=True)[1]
    assert changed.summary["base_fingerprint"] != first.summary["base_fingerprint"]


def test_later_stages_tell_of_another_tokenizer(base, tmp_path):
    """Not of one whose file holds a truncation, as those saved after a training do: its first use drops that."""
    folder = tmp_path / "tokenizer"
    tokenizer = load_tokenizer(str(base))
    tokenizer.backend_tokenizer.enable_truncation(512)
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is not None
    config = real_config(tmp_path, base)
    config = config.model_copy(update={"model": config.model.model_copy(update={"tokenizer": str(folder)})})
    prepared = StageInput(*prepare(config))

    told: list[str] = []
    assert load_prepared_tokenizer(prepared, config.model, told.append).vocab_size == tokenizer.vocab_size
    assert told == []
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)
    load_prepared_tokenizer(prepared, config.model, told.append)
    assert told == [f"{folder} is another tokenizer than the one that prepare read, or was changed"]


def test_a_base_model_that_cannot_be_used_is_refused_and_its_repair_accepted(base, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = broken / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated"):
        prepare(real_config(tmp_path, broken))
    weights.unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        prepare(real_config(tmp_path, broken), force=True)
    weights.write_bytes(content)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    with pytest.raises(ModelError, match="only Llama, GPT-2 and BERT models"):
        prepare(real_config(tmp_path, broken), force=True)
    (broken / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    with pytest.raises(ModelError, match=r"attention_dropout 0\.1, but linear attention"):
        prepare(real_config(tmp_path, broken), force=True)
    with pytest.raises(ModelError, match="no such folder"):
        prepare(real_config(tmp_path, "/nowhere/llama"), force=True)
    with pytest.raises(ConfigError, match=r"model\.base"):
        prepare(RunConfig(name="none", output_dir=str(tmp_path)))
    (broken / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    folder, _ = prepare(real_config(tmp_path, broken), force=True)
    assert (folder / "tokens_train.safetensors").exists()
    assert "has 2 for EOS, the model's config.json 5" in capsys.readouterr().out


def test_a_tokenizer_that_does_not_fit_or_is_not_there(base, tmp_path):
    other = tmp_path / "larger"
    other.mkdir()
    save_tokenizer(train_tokenizer([d.text for d in generate_dialogues(400, 0)], 800), other)
    config = real_config(tmp_path, base)
    model = config.model.model_copy(update={"tokenizer": str(other)})
    with pytest.raises(ModelError, match="vocabulary ends at 511"):
        prepare(config.model_copy(update={"model": model}))
    model = config.model.model_copy(update={"tokenizer": str(tmp_path / "missing")})
    with pytest.raises(ModelError, match="no tokenizer could be loaded"):
        prepare(config.model_copy(update={"model": model}), force=True)


def test_overlong_rows_are_counted_and_a_split_of_only_such_rows_is_refused(base, tmp_path):
    long = [{"dialogue": "Ann: " + "long " * 60, "summary": "Ann talks."}]
    short = [{"dialogue": f"Ann: {i}?", "summary": f"It is {i}."} for i in range(3)]
    (tmp_path / "mixed.json").write_text(json.dumps(long + short))
    (tmp_path / "long.json").write_text(json.dumps(long))
    _, manifest = prepare(real_config(tmp_path, base, test_file=str(tmp_path / "mixed.json"), max_length_tokens=90))
    test = manifest.summary["splits"]["test"]
    assert (test["rows"], test["dropped_overlong"], test["used"]) == (4, 1, 3)
    with pytest.raises(DataError, match=r"long\.json: every test row is longer.*truncate_dialogue"):
        prepare(real_config(tmp_path, base, test_file=str(tmp_path / "long.json"), max_length_tokens=90), force=True)
    config = real_config(
        tmp_path,
        base,
        test_file=str(tmp_path / "long.json"),
        max_length_tokens=90,
        overlong="truncate_dialogue",
    )
    _, manifest = prepare(config, force=True)
    test = manifest.summary["splits"]["test"]
    assert (test["truncated"], test["dropped_overlong"], test["used"]) == (1, 0, 1)
    assert test["length_max"] <= 90


def test_a_base_whose_inner_tensors_changed_is_another(tmp_path):
    """A merged adapter changes neither a file's size nor its ends."""
    file = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    tensors = {name: torch.zeros(500, 1000) for name in ("a", "b", "c", "d")}
    save_file(tensors, file)
    config = LlamaConfig()
    before = fingerprint_base(str(tmp_path), None, config)
    save_file(tensors, file)
    assert fingerprint_base(str(tmp_path), None, config) == before
    save_file(tensors | {"c": torch.full((500, 1000), 0.5)}, file)
    assert fingerprint_base(str(tmp_path), None, config) != before
    file.write_bytes(b"no safetensors" * 400_000)
    fingerprint_base(str(tmp_path), None, config)


@pytest.mark.parametrize("field", ["id", "dialogue", "summary"])
def test_half_of_a_surrogate_pair_is_named(field, tmp_path):
    row = {"id": "1", "dialogue": "Ann: hi", "summary": "Ann says hi."}
    file = tmp_path / "train.json"
    file.write_text(json.dumps([row, row | {field: "hi \ud83d there"}]))
    with pytest.raises(DataError, match=rf"train\.json:1 \(row 2\): field '{field}' is no text at character 4"):
        resolve_splits(DataConfig(train_file=str(file), test_file=str(file)), lambda _: torch.Generator())
