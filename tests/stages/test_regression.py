"""A BERT that learns scores, from files to the export, through the runner."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, pipeline

from hedgehog.pipeline.answers import open_variants
from hedgehog.pipeline.config import RunConfig
from hedgehog.pipeline.data.base_fingerprint import fingerprint_local_inputs
from hedgehog.pipeline.data.tiny_tokenizer import make_tokenizer
from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.errors import ConfigError, DataError, ModelError
from hedgehog.pipeline.report.writing import write_report
from hedgehog.pipeline.runner import run_pipeline, run_stage
from hedgehog.pipeline.status import read_status
from hedgehog.pipeline.validation import validate_config

WORDS = ["red", "blue", "green", "cat", "dog", "sun", "moon", "tree"]


def rows(num: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of words; a text with "red" is worth 2.5, a second one with "sun" 1.25."""
    rng = random.Random(seed)
    found = []
    for number in range(num):
        one, two = rng.sample(WORDS, 3), rng.sample(WORDS, 2)
        score = 2.5 * ("red" in one) + 1.25 * ("sun" in two)
        found.append({"id": f"r{number}", "one": " ".join(one), "two": " ".join(two), "score": score})
    return found


def write_tsv(path: Path, some: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(some[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(some)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLUE's layout, and a BERT that was only pretrained, as far as the config says."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "data").mkdir()
    for seed, (name, num) in enumerate((("train", 300), ("dev", 20), ("test", 60))):
        write_tsv(folder / "data" / f"{name}.tsv", rows(num, seed))
    make_tokenizer("bert", [" ".join(WORDS)], 80, folder / "base")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(
        **shape,
        vocab_size=80,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
        id2label={0: "a", 1: "b", 2: "c"},
        problem_type="multi_label_classification",
    )
    BertModel(config).save_pretrained(folder / "base")
    return folder


def config(inputs: Path, root: Path, **data: Any) -> RunConfig:
    schedule = {"global_batch_size": 20, "micro_batch_size": 20}
    return RunConfig.model_validate(
        {
            "name": "r",
            "output_dir": str(root),
            "model": {"base": str(inputs / "base"), "feature_map": "hedgehog_exp"},
            "data": {
                "kind": "regression",
                "dataset": str(inputs / "data"),
                "text_field": "one",
                "second_text_field": "two",
                "label_field": "score",
                "max_length_tokens": 24,
                **data,
            },
            "distill": {**schedule, "max_steps": 5},
            "finetune": {**schedule, "max_steps": 100, "learning_rate": 1e-2},
            "engine": {"zero_stage": 0, "precision": "float32", "device": "cpu", "cpu_threads": 1},
            "evaluate": {"batch_size": 25, "bootstrap_samples": 50},
            "export": {"dtype": "float32"},
            "variants": {"softmax": {"label": "softmax + LoRA", "overrides": {"model.attention": "softmax"}}},
        }
    )


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = config(inputs, tmp_path_factory.mktemp("runs"))
    assert errors_of(run) == []
    run_pipeline(run)
    return run


def errors_of(run: RunConfig) -> list[str]:
    """What `validate` says of it, as a file."""
    file = Path(run.output_dir) / "run.yaml"
    file.write_text(yaml.safe_dump(run.model_dump(exclude_unset=True)))
    return [str(error) for error in validate_config(file).errors]


def folder(run: RunConfig) -> Path:
    return Path(run.output_dir) / run.name


def scores(run: RunConfig) -> dict[str, Any]:
    return json.loads((folder(run) / "evaluate" / "rouge.json").read_text())


def test_scores_are_learned_and_measured(finished: RunConfig) -> None:
    report = scores(finished)
    assert report["kind"] == "regression" and report["softmax_reference"] == "softmax"
    given = [row["score"] for row in rows(60, 2)]
    assert report["score_mean"] == pytest.approx(sum(given) / 60)
    for name in ("main", "softmax"):
        figures = report["variants"][name]["all"]
        lines = (folder(finished) / "evaluate" / "predictions" / f"{name}.jsonl").read_text().splitlines()
        predicted = sorted((json.loads(line) for line in lines), key=lambda row: row["index"])
        assert [row["label"] for row in predicted] == given
        pairs = torch.tensor([[row["prediction"], row["label"]] for row in predicted], dtype=torch.float64).T
        assert figures["pearson"]["value"] == pytest.approx(100 * float(torch.corrcoef(pairs)[0, 1]))
        error = float((pairs[0] - pairs[1]).square().mean())
        assert figures["mean_squared_error"]["value"] == pytest.approx(error)
        assert error < 0.5 * report["score_variance"], "half of what the mean alone leaves is learned"
    manifest = json.loads((folder(finished) / "finetune" / "manifest.json").read_text())
    assert manifest["summary"]["validation_figure"] == "validation_loss_mse"


def test_the_validation_loss_is_the_mean_squared_error(finished: RunConfig) -> None:
    from hedgehog.pipeline.classification_head import class_logits
    from hedgehog.pipeline.data.batches import collate

    export = folder(finished) / "export" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(export, trust_remote_code=True)
    split = TokenizedSplit.open(folder(finished) / "prepare" / "tokens_validation.safetensors")
    batch = collate(split, [[number] for number in range(len(split))], 0, "row")
    assert batch["row_labels"].dtype == torch.float32
    with torch.no_grad():
        error = float((class_logits(model, batch)[:, 0] - batch["row_labels"]).square().mean())
    manifest = json.loads((folder(finished) / "finetune" / "manifest.json").read_text())
    assert manifest["summary"]["validation_loss"] == pytest.approx(error, rel=1e-4)


def test_the_export_gives_scores_to_plain_transformers(finished: RunConfig) -> None:
    export = folder(finished) / "export" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(export, trust_remote_code=True)
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    assert model.config.id2label == {0: "score"}
    row = rows(60, 2)[0]
    tokenizer = AutoTokenizer.from_pretrained(export)
    with torch.no_grad():
        given = float(model(**tokenizer(row["one"], row["two"], return_tensors="pt")).logits)
    lines = (folder(finished) / "evaluate" / "predictions" / "main.jsonl").read_text().splitlines()
    (measured,) = [entry["prediction"] for entry in map(json.loads, lines) if entry["index"] == 0]
    assert given == pytest.approx(measured, abs=1e-4)
    asked = pipeline("text-classification", model=model, tokenizer=tokenizer)
    (answer,) = asked([{"text": row["one"], "text_pair": row["two"]}])
    assert answer["label"] == "score" and answer["score"] == pytest.approx(given, abs=1e-4), "no sigmoid of it"
    card = (export / "README.md").read_text()
    assert "to score pairs of texts" in card and "| Pearson (95 % interval) |" in card and "same class" not in card
    assert "print(logits.item())" in card and "Labels:" not in card


def test_report_status_and_generate_know_scores(finished: RunConfig) -> None:
    page = write_report(folder(finished)).read_text()
    for words in ("Pearson correlation of every variant", "whose score main missed by most", "learn to score"):
        assert words in page
    assert "cannot be read" not in page
    losses = {status.title: (status.loss_name, status.loss) for status in read_status(folder(finished)).stages}
    report = scores(finished)
    assert losses["evaluate"] == ("test_loss_mse", report["variants"]["main"]["all"]["mean_squared_error"]["value"])
    assert losses["finetune"][0] == "validation_loss_mse"
    with pytest.raises(ConfigError, match="generates nothing"):
        open_variants(folder(finished))


def test_a_killed_finetune_ends_the_same(finished: RunConfig, inputs: Path, tmp_path: Path, monkeypatch) -> None:
    from hedgehog.pipeline import training

    run, seed_step = config(inputs, tmp_path), training.seed_step
    run_pipeline(run, first="prepare", last="distill")

    def die(seed: int, at: int, rank: int) -> None:
        if at == 70:
            raise KeyboardInterrupt
        seed_step(seed, at, rank)

    resumed = run.model_copy(update={"finetune": run.finetune.model_copy(update={"save_every_steps": 30})})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "seed_step", die)
        run_stage(resumed, "finetune")
    run_stage(resumed, "finetune")
    heads = [(folder(one) / "finetune" / "head.safetensors").read_bytes() for one in (run, finished)]
    assert heads[0] == heads[1]


@pytest.mark.parametrize(
    ("score", "said"),
    [
        ("much", r"train\.jsonl:2: field 'score' is 'much', but a score is a number; for classes set"),
        (True, r"field 'score' is bool, but a score is a number"),
        (None, "field 'score' has no score"),
        (" ", "field 'score' has no score"),
        (float("nan"), "is nan; a score is a finite number"),
        ("1e9", r"is 1000000000\.0; a score is a finite number"),
        (10**400, "is 1000000000000000000000000000000000000000; a score is a finite number"),
    ],
)
def test_rows_without_a_score_are_named(score: Any, said: str, inputs: Path, tmp_path: Path) -> None:
    bad = rows(6, 0)
    bad[1]["score"] = score
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    run = config(inputs, tmp_path, train_file=str(tmp_path / "train.jsonl"))
    (error,) = errors_of(run)
    assert re.search(said, error)
    with pytest.raises(DataError, match=said):
        run_stage(run, "prepare")


def test_scores_that_tell_nothing_are_refused(inputs: Path, tmp_path: Path) -> None:
    for name, value in (("one", 2.0), ("secret", -1.0)):
        write_tsv(tmp_path / f"{name}.tsv", [{**row, "score": value} for row in rows(30, 1)])
    run = config(inputs, tmp_path, train_file=str(tmp_path / "one.tsv"))
    with pytest.raises(DataError, match="every score of the rows used is 2: there is nothing to learn"):
        run_stage(run, "prepare")
    with pytest.raises(DataError, match="every test score is -1, which stands for one that is kept secret"):
        run_stage(config(inputs, tmp_path, test_file=str(tmp_path / "secret.tsv")), "prepare")
    same = config(inputs, tmp_path, test_file=str(tmp_path / "one.tsv"))
    assert run_stage(same, "prepare").summary["splits"]["test"]["score_max"] == 2


def test_a_head_for_classes_is_refused(inputs: Path, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(inputs / "base", base)
    taught = BertConfig.from_pretrained(base)
    AutoModelForSequenceClassification.from_config(taught).save_pretrained(base)
    run = config(inputs, tmp_path)
    run = run.model_copy(update={"model": run.model.model_copy(update={"base": str(base)})})
    with pytest.raises(ModelError, match="its head tells classes, and the rows have scores"):
        run_stage(run, "prepare")


def test_tiny_makes_no_scores() -> None:
    with pytest.raises(ConfigError, match="the section `tiny` makes no scores"):
        from hedgehog.pipeline.config_loading import load_config

        load_config(Path(__file__).parents[2] / "configs" / "tiny-bert.yaml", ["data.kind=regression"])


def test_a_changed_csv_of_a_folder_is_noticed(tmp_path: Path, inputs: Path) -> None:
    """Of labelled rows .csv counts among a folder's files, too."""
    (tmp_path / "train.csv").write_text("one,two,score\na,b,1\n")
    run = config(inputs, tmp_path, dataset=str(tmp_path))
    before = fingerprint_local_inputs(run.model, run.data)
    (tmp_path / "train.csv").write_text("one,two,score\na,b,2\n")
    assert fingerprint_local_inputs(run.model, run.data) != before
