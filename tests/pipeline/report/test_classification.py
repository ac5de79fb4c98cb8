"""The page of a run that classifies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hedgehog.pipeline.data.tokens import TokenizedSplit
from hedgehog.pipeline.manifest import Artifact
from hedgehog.pipeline.report.writing import write_report

from .reading import read, text
from .reading import section as find_section

NAMES = ["no", 'may | "be" <b>`x`</b>\nso', "yes"]
"""The second has what table, page and prose give a meaning to."""
LABELS = [0, 2, 0, 1, 2, 0, 2, 0, 2, 0, 0, 0]
MAIN = [0, 0, 0, 2, 0, 0, 2, 1, 0, 0, 2, 0]  # six wrong: 1, 3, 4, 7, 8 and 10
SOFT = [0, 2, 0, 0, 2, 0, 2, 0, 0, 0, 2, 0]  # of these 1, 4 and 7 right


def figure(value: float, half_width: float = 1.0) -> dict[str, float]:
    return {"value": value, "low": value - half_width, "high": value + half_width}


def scores_file(**changes: Any) -> dict[str, Any]:
    subset = {
        "num_examples": 12,
        "accuracy": figure(50.0, 12.5),
        "f1": figure(44.0),
        "mcc": figure(21.0),
        "loss_nats_per_row": figure(0.75, 0.25),
    }
    compared = {"accuracy_difference": figure(-25.0, 8.0), "loss_gap_nats_per_row": figure(0.5, 0.125)}

    def variant(label: str, **more: Any) -> dict[str, Any]:
        return {"label": label, "kl_mean_nats": None, "all": {**subset, **more}, "unseen": {**subset, **more}}

    return {
        "kind": "classification",
        "settings": {
            "metric": "accuracy, F1 and Matthews correlation, in points (x 100)",
            "f1_class": None,
            "intervals": {"kind": "percentile bootstrap", "level": 0.95, "samples": 1000, "seed": 0},
            "precision": "float32",
        },
        "num_examples": 12,
        "num_examples_seen_in_train": 1,
        "label_counts": {name: LABELS.count(number) for number, name in enumerate(NAMES)},
        "softmax_reference": "soft",
        "variants": {
            "main": variant("Hedgehog & LoRA", **compared),
            "soft": variant("softmax <b>"),
            "t2r": variant("T2R", **compared),
        },
        **changes,
    }


def write_scores(root: Path, content: dict[str, Any]) -> None:
    (root / "evaluate" / "rouge.json").write_text(json.dumps(content))


def write_predictions(root: Path, name: str, classes: list[int]) -> None:
    folder = root / "evaluate" / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "index": index,
            "id": f"r{index}",
            "label": NAMES[LABELS[index]],
            "prediction": NAMES[number],
            "loss_nats": 0.5,
            "seen_in_train": index == 1,
        }
        for index, number in enumerate(classes)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_examples(run: Any, *, pairs: bool = True) -> None:
    rows = [
        {
            "id": f"r{index}",
            "text": f"first <i>text</i> {index}",
            **({"second_text": f"second text {index}"} if pairs else {}),
            "label": NAMES[label],
            "seen_in_train": index == 1,
        }
        for index, label in enumerate(LABELS)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    artifacts = {"examples_test": Artifact(path="examples_test.jsonl", sha256="e" * 64, num_bytes=len(lines))}
    folder = run.stage("prepare", artifacts=artifacts, summary={"kind": "classification"})
    (folder / "examples_test.jsonl").write_text(lines)


@pytest.fixture
def classified(new_folder: Any, training_records: Any) -> Any:
    """A finished run with a softmax baseline."""
    run = new_folder
    run.config(data={"kind": "classification", "dataset": "some/rows", "second_text_field": "second"})
    write_examples(run)
    run.stage("distill", summary={"kl_mean": 0.25, "kl_per_layer": [0.2], "layers": [0], "steps": 1})
    run.stage("finetune", training_records(60, "loss_nats", "validation_loss_nats"))
    for name in ("soft", "t2r"):
        run.stage(f"variants/{name}/distill", skipped="off")
        run.stage(f"variants/{name}/finetune", training_records(60, "loss_nats", "validation_loss_nats"))
    records = [{"step": step, "tokens": 600, "loss_nats": 0.7, "step_s": 2.0} for step in (1, 2)]
    run.stage("evaluate", records, summary={"training": {}})
    run.stage("export")
    write_scores(run.root, scores_file())
    for name, classes in (("main", MAIN), ("soft", SOFT), ("t2r", MAIN)):
        write_predictions(run.root, name, classes)
    return run


def page_of(run: str = "trial") -> ElementTree.Element:
    return read(write_report(run))


def section(page: ElementTree.Element, name: str) -> str:
    return text(find_section(page, name))


def test_everything_speaks_of_classes(classified):
    page = page_of()
    assert [e.get("id") for e in page.iter("section")] == [
        "results", "stage-one", "stage-two", "cost", "mistakes", "provenance",
    ]  # fmt: skip
    header = text(page.find("body/header"))
    assert (
        "Hedgehog & LoRA: accuracy is -25.0 points (-33.0 to -17.0) against softmax <b>, "
        "loss +0.5000 nats a row (+0.3750 to +0.6250)." in header
    )
    results = section(page, "results")
    assert "variant accuracy F1 MCC loss mean KL train min peak memory" in results
    assert "Hedgehog & LoRA 50.00 ± 12.50 44.00 21.00 0.7500" in results
    titles = [e.text for e in page.iter("title")]
    assert "Accuracy of every variant" in titles and "Loss of every variant" in titles
    assert "12 test rows, 1 of which stand word for word in train, float32." in results
    assert "Accuracy without those: Hedgehog & LoRA 50.00, softmax <b> 50.00, T2R 50.00." in results
    assert "The most frequent label, “no”, is that of 58.3%." in results
    assert "F1 (the mean over the classes)" in results
    assert "loss, nats a row" in section(page, "stage-two") and "learn to classify" in section(page, "stage-two")
    cost = section(page, "cost")
    assert "of evaluate the tokens of its rows" in cost and "evaluate all done 1.5 300 " in cost
    told = [header, *(section(page, name) for name in ("results", "stage-one", "stage-two", "cost", "mistakes"))]
    for word in ("ROUGE", "erplexity", "ummar", "ialogue", "generated"):
        assert word not in " ".join(told), word


def test_rows_that_were_taken_for_another_class(classified):
    page = page_of()
    articles = [text(e) for e in page.iter("article")]
    assert [article.split()[1] for article in articles] == ["r3", "r4", "r7", "r8", "r10", "r1"], "r1 stands in train"
    shown = " ".join(NAMES[1].split())
    assert articles[0] == (f"Row r3 first <i>text</i> 3 second text 3 Label {shown} Hedgehog & LoRA yes softmax <b> no")
    assert "Row r1 (stands in train)" in articles[-1] and "T2R" not in section(page, "mistakes")
    said = section(page, "mistakes")
    assert "6 of the 6 that it got wrong, of 12 rows" in said and "Of these 6 softmax <b> got 3 right." in said


def test_a_list_of_mistakes_is_short(classified):
    write_predictions(classified.root, "main", [1] * 12)
    assert len(list(page_of().iter("article"))) == 8
    assert "8 of the 11 that it got wrong, of 12 rows" in section(page_of(), "mistakes")


def test_single_texts_and_long_ones(classified):
    write_rows = classified.root / "prepare/examples_test.jsonl"
    rows = [json.loads(line) for line in write_rows.read_text().splitlines()]
    for row in rows:
        del row["second_text"]
        row["text"] = "x" * 5000
    write_rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = section(page_of(), "mistakes")
    assert "second text" not in said and "… [cut here]" in said and max(map(len, re.findall("x+", said))) == 2000


def test_nothing_wrong_and_nothing_there(classified):
    write_predictions(classified.root, "main", LABELS)
    assert "Hedgehog & LoRA got all 12 test rows right." in section(page_of(), "mistakes")
    write_predictions(classified.root, "main", LABELS[:1])
    assert "got the one test row right." in section(page_of(), "mistakes")
    (classified.root / "evaluate/predictions/main.jsonl").unlink()
    assert "None yet: evaluate has written no predictions." in section(page_of(), "mistakes")


def test_half_a_run_of_evaluate(classified):
    """No scores yet, a baseline that is behind, a torn last line, rows of something else."""
    (classified.root / "evaluate/rouge.json").unlink()
    file = classified.root / "evaluate/predictions/main.jsonl"
    file.write_text(file.read_text() + '{"index": 12, "prediction": "no"}\n{"index": 13, "lab')
    (classified.root / "evaluate/predictions/soft.jsonl").write_text("")
    page = page_of()
    assert "there is no rouge.json yet" in section(page, "results")
    assert len(list(page.iter("article"))) == 6 and "got" not in section(page, "mistakes").partition("wrong")[2]
    write_scores(classified.root, scores_file())
    write_predictions(classified.root, "soft", SOFT[:5])
    assert "Of these 3 softmax <b> got 2 right." in section(page_of(), "mistakes")


def test_texts_of_another_prepare_are_not_shown(classified):
    file = classified.root / "prepare/examples_test.jsonl"
    rows = [json.loads(line) | {"label": "another"} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = section(page_of(), "mistakes")
    assert "first" not in said and "another id or label than the one that evaluate saw" in said
    file.unlink()
    assert "The text is not shown: there is no examples_test.jsonl in prepare's folder." in section(
        page_of(), "mistakes"
    )


def test_names_of_classes_are_no_markup(classified):
    content = scores_file(label_counts={NAMES[1]: 12})
    content["settings"]["f1_class"] = NAMES[1]
    write_scores(classified.root, content)
    page = page_of()
    assert "F1 (that of “may | \"be\" <b>'x'</b> so”)" in section(page, "results")
    assert "The most frequent label, “may | \"be\" <b>'x'</b> so”, is that of 100.0%." in section(page, "results")
    assert not list(next(e for e in page.iter("section") if e.get("id") == "results").iter("b"))


def test_a_run_without_variants(classified):
    content = scores_file(softmax_reference=None)
    content["variants"] = {"main": content["variants"]["main"]}
    content["settings"]["intervals"]["samples"] = 0
    for key in ("accuracy", "f1", "mcc", "loss_nats_per_row"):
        content["variants"]["main"]["all"][key] |= {"low": None, "high": None}
    write_scores(classified.root, content)
    page = page_of()
    said = "Hedgehog & LoRA: accuracy is 50.00, F1 44.00, MCC 21.00, loss 0.7500 nats a row."
    assert said in text(page.find("body/header"))
    assert "±" not in section(page, "results") and "softmax" not in section(page, "mistakes")


def without(content: dict[str, Any], *keys: str) -> dict[str, Any]:
    inner: Any = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return content


MISSING = "Value error, accuracy, F1, MCC, a loss, or how many rows each label has, is missing"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (without(scores_file(), "variants", "main", "all", "accuracy"), MISSING),
        (without(scores_file(), "variants", "t2r", "unseen", "mcc"), MISSING),
        (without(scores_file(), "variants", "soft", "all", "loss_nats_per_row"), MISSING),
        (without(scores_file(), "label_counts"), MISSING),
        (scores_file(label_counts={"no": 0}), MISSING),
        (scores_file(num_examples=0), MISSING),
        (without(scores_file(), "settings"), "settings: Field required"),
        (scores_file(kind="tagging"), "kind: Input should be 'dialogues', 'text', 'classification' or 'regression'"),
        (without(scores_file(), "kind"), "Value error, a figure of ROUGE, or how summaries were generated"),
    ],
)
def test_scores_that_lack_something_are_told_of(classified, content, said):
    write_scores(classified.root, content)
    page = page_of()
    results = section(page, "results")
    assert "No scores: rouge.json cannot be read (" in results and said in results
    assert "hedgehog evaluate CONFIG --force makes it anew." in results
    assert len(list(page.iter("article"))) == 6, "the rows are there all the same"


def test_scores_of_another_kind_are_not_shown(classified):
    write_scores(classified.root, scores_file(kind="text"))
    said = "No scores: rouge.json is of running text, and data.kind is classification."
    assert said in section(page_of(), "results")
    classified.scores(main={}, soft={})
    assert "rouge.json is of dialogues, and data.kind is classification." in section(page_of(), "results")


def test_without_a_config_prepare_says_which_kind_it_is(classified):
    """What prepare noted says which kind it is."""
    (classified.root / "config.resolved.yaml").unlink()
    page = page_of()
    assert "Row r3" in section(page, "mistakes") and "loss, nats a row" in section(page, "stage-two")


def test_an_evaluation_that_is_not_finished_counts_rows(classified):
    manifest = json.loads((classified.root / "evaluate/manifest.json").read_text())
    (classified.root / "evaluate/manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    prepare = classified.root / "prepare"
    TokenizedSplit.from_rows([([1], [])] * 12, [0] * 12).write(prepare / "tokens_test.safetensors")
    prepared = json.loads((prepare / "manifest.json").read_text())
    prepared["artifacts"]["tokens_test"] = {"path": "tokens_test.safetensors", "sha256": "0" * 64, "num_bytes": 1}
    (prepare / "manifest.json").write_text(json.dumps(prepared))
    write_predictions(classified.root, "t2r", MAIN[:5])
    classified.age()
    assert "… evaluate unfinished, 29 of 36 rows" in text(page_of().find("body/header"))
