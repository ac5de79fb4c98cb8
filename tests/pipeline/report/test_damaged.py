"""What cannot be read, is torn or is of something else costs only itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hedgehog.pipeline.report.writing import write_report

from .reading import invoke, read, section, text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"variants": {"main": ', "rouge.json cannot be read (Expecting value"),
        ("[" * 100_000, "rouge.json cannot be read (brackets in brackets without end)"),
        ("[]", "rouge.json cannot be read (: Input should be a valid dictionary"),
        ('{"variants": {"main": {"label": "x", "all": null}}}', "rouge.json cannot be read (settings: Field required"),
        (
            '{"settings": {"intervals": {"samples": 0}, "precision": "float32"}, "num_examples": 1, '
            '"variants": {"main": {"label": "x", "all": {"num_examples": 1}}}}',
            "rouge.json cannot be read (: Value error, a figure of ROUGE, or how summaries were generated, is missing)",
        ),
    ],
)
def test_scores_that_cannot_be_read_are_told_of(finished, content, said):
    (finished.root / "evaluate/rouge.json").write_text(content)
    page = read(write_report("trial"))
    assert f"No scores: {said}" in text(section(page, "results"))
    assert "hedgehog evaluate CONFIG --force makes it anew." in text(section(page, "results"))
    assert len(list(section(page, "summaries").iter("article"))) == 5


def test_torn_and_wrong_lines_cost_only_themselves(finished):
    with open(finished.root / "distill/metrics.jsonl", "ab") as file:
        file.write(b'\n[1]\nnull\n{"step": null, "kl_nats": 1}\n{"step": "x", "step_s": "y", "tokens": []}\n')
        file.write(
            b'{"step": 61, "kl_nats": NaN}\n{"step": 62, "kl_nats": Infinity, "step_s": NaN}\n\xff\xfe{"step": 6'
        )
    for name in ("main", "soft", "t2r"):
        with open(finished.root / f"evaluate/predictions/{name}.jsonl", "a") as file:
            file.write('{"index": "9"}\n{"index": 3, "prediction": null}\n{"index": 2, "predi')
    with open(finished.root / "prepare/examples_test.jsonl", "a") as file:
        file.write("[]\n{")
    page = read(write_report("trial"))
    one = section(page, "stage-one")
    assert "3 values left out: no finite number." in text(one)
    assert "at step 60" in " ".join(e.text or "" for e in one.iter("desc")) and len(list(one.iter("polyline"))) == 4
    assert len(list(section(page, "summaries").iter("article"))) == 5


def test_a_dialogue_of_another_prepare_is_not_shown(finished):
    """Nor where only the ids are the same, as they are in two data sets that number their rows."""
    file = finished.root / "prepare/examples_test.jsonl"
    for changes in ({"id": "other"}, {"summary": "another"}):
        lines = [json.loads(line) | changes | {"dialogue": "SECRET"} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        samples = section(read(write_report("trial")), "summaries")
        assert "SECRET" not in text(samples) and len(list(samples.iter("article"))) == 5
        assert "another id or summary than the one that evaluate saw" in text(samples)
    file.unlink()
    samples = text(section(read(write_report("trial")), "summaries"))
    assert "The dialogue is not shown: there is no examples_test.jsonl in prepare's folder." in samples


def change_summary(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["summary"] |= values
    (folder / "manifest.json").write_text(json.dumps(content))


def test_a_layer_that_is_not_finite_is_told_of(finished):
    change_summary(finished.root / "distill", kl_per_layer=[0.2, math.nan], kl_per_head=[[0.2], [math.nan]])
    one = text(section(read(write_report("trial")), "stage-one"))
    assert "Hedgehog & LoRA 1 layer not finite" in one and "Hedgehog & LoRA mean" not in one
    assert "T2R mean 0.5000" in one
    change_summary(finished.root / "distill", kl_per_layer=[math.nan, math.nan])
    one = text(section(read(write_report("trial")), "stage-one"))
    assert "Hedgehog & LoRA 2 layers not finite" in one and "axes differ" not in one


@pytest.mark.parametrize(
    ("place", "values", "name", "said"),
    [
        ("evaluate", {"training": None}, "results", "What evaluate noted of the training cannot be read."),
        ("evaluate", {"training": {"main": None}}, "results", "noted of the training cannot be read."),
        ("evaluate", {"training": {"main": {"minutes": "x"}}}, "results", "noted of the training cannot be read."),
        ("evaluate", {"variants": None}, "results", "40.00 ± 2.00"),
        ("distill", {"kl_per_head": [None, [0.3]]}, "stage-one", "KL per layer in the manifest of distill cannot"),
        ("distill", {"kl_per_layer": None}, "stage-one", "KL per layer in the manifest of distill cannot be read."),
        ("distill", {"layers": [None, "x"]}, "stage-one", "KL per layer in the manifest of distill cannot be read."),
    ],
)
def test_a_damaged_summary_costs_only_what_it_holds(finished, place, values, name, said):
    change_summary(finished.root / place, **values)
    page = read(write_report("trial"))
    assert said in text(section(page, name)) and "T2R mean 0.5000" in text(page)


def test_rows_of_brackets_cost_only_themselves(finished):
    for place in ("distill/metrics.jsonl", "evaluate/predictions/main.jsonl", "prepare/examples_test.jsonl"):
        with open(finished.root / place, "a") as file:
            file.write("[" * 100_000 + "\n")
    assert len(list(section(read(write_report("trial")), "summaries").iter("article"))) == 5


@pytest.mark.parametrize(
    ("name", "place", "said"),
    [
        ("rouge.json", "results", "No scores: rouge.json cannot be read (Permission denied)."),
        ("main.jsonl", "summaries", "main.jsonl cannot be read (Permission denied)."),
        ("examples_test.jsonl", "summaries", "not shown: examples_test.jsonl cannot be read (Permission denied)."),
    ],
)
def test_a_file_that_may_not_be_read_is_not_called_missing(finished, forbid, name, place, said):
    forbid(name)
    shown = text(section(read(write_report("trial")), place))
    assert said in shown and "--force" not in shown


@pytest.mark.parametrize("name", ["manifest.json", "trial"])
def test_a_run_that_may_not_be_read(finished, forbid, name):
    forbid(name)
    result = invoke("trial")
    assert result.exit_code == 2 and result.stderr.startswith("error: "), result.output
    assert "(Permission denied)" in result.stderr
