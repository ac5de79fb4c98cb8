"""The whole page, of runs in every state, through the command line."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from hedgehog.pipeline import cli
from hedgehog.pipeline.manifest import Artifact, read_manifest
from hedgehog.pipeline.report.writing import write_report
from hedgehog.pipeline.run_folder import RunFolder
from hedgehog.pipeline.slurm.job_records import JobRecord, JobRecords, write_records

SECTIONS = ["results", "stage-one", "stage-two", "cost", "summaries", "provenance"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["report", *(str(argument) for argument in arguments)])


def read(file: Path) -> ElementTree.Element:
    """The page, which is well-formed XML behind its first line."""
    first, _, rest = file.read_text().partition("\n")
    assert first == "<!DOCTYPE html>"
    return ElementTree.fromstring(re.sub(r' xmlns="[^"]*"', "", rest))


def text(element: ElementTree.Element | None) -> str:
    assert element is not None
    return " ".join(" ".join(element.itertext()).split())


def section(page: ElementTree.Element, name: str) -> ElementTree.Element:
    found = next((e for e in page.iter("section") if e.get("id") == name), None)
    assert found is not None, name
    return found


def rows(element: ElementTree.Element) -> list[list[str]]:
    return [[text(cell) for cell in row] for row in element.iter("tr")]


def test_the_command_says_where_the_page_is(finished):
    result = invoke("trial")
    assert (result.exit_code, result.stdout) == (0, "runs/trial/report.html\n")
    other = invoke("runs/trial", "--output", "elsewhere/my.html")
    assert (other.exit_code, other.stdout) == (0, "elsewhere/my.html\n")
    without_time = [re.sub(r"on [-0-9 :]+ UTC", "", file.read_text()) for file in map(Path, other.stdout.split())]
    assert without_time == [re.sub(r"on [-0-9 :]+ UTC", "", Path("runs/trial/report.html").read_text())]


def test_an_earlier_page_is_replaced_and_nothing_else_is_left(finished):
    file = Path("runs/trial/report.html")
    file.write_text("old")
    before = {path for path in Path("runs").rglob("*")}
    assert invoke("trial").exit_code == 0
    assert file.read_text() != "old" and {path for path in Path("runs").rglob("*")} == before


def test_a_finished_run_shows_everything_in_order(finished):
    page = read(write_report("trial"))
    assert [e.get("id") for e in page.iter("section")] == SECTIONS
    header = text(page.find("body/header"))
    assert "trial Hedgehog & LoRA: ROUGE-1 is 95.0% of softmax <b>'s (95 % interval 90.0% to 100.0%)" in header
    assert "loss +0.1000 nats a token (+0.0500 to +0.1500)." in header
    assert "some/llama" in header and "feature map hedgehog_softmax" in header
    assert "✓ distill done; 2 of 2 variants done" in header and "To go on" not in header

    table = rows(section(page, "results"))
    assert table[1] == [
        "Hedgehog & LoRA", "40.00 ± 2.00", "40.00", "40.00", "1.2500", "3.49", "–", "3.0", "3.0 GiB",
    ]  # fmt: skip
    titles = [e.text for e in section(page, "results").iter("title")]
    assert "ROUGE-1 of every variant" in titles and "Loss of every variant" in titles

    one = section(page, "stage-one")
    assert "axes differ" not in text(one)
    assert "T2R mean 0.5000; not trained" in text(one) and "Hedgehog & LoRA mean 0.2500 " in text(one)
    assert sum(e.get("class") == "bar" for e in one.iter("rect")) == 4
    two = section(page, "stage-two")
    wide = next(e for e in two.iter("div") if e.get("class") == "wide")
    assert len([e for e in wide.iter("polyline") if e.get("class") == "line"]) == 3
    assert len([e for e in wide.iter() if e.get("class") == "mark"]) == 3 * 6

    cost = rows(section(page, "cost"))
    assert cost[2] == ["distill", "Hedgehog & LoRA", "done", "1.5", "2,000", "3.0 GiB", "1"]
    assert ["distill", "softmax <b>"] not in [row[:2] for row in cost], "it had nothing to do"
    assert len(cost) == 1 + 8 and "12.0 minutes, 0.20 process-hours" in text(section(page, "cost"))

    samples = section(page, "summaries")
    assert len(list(samples.iter("article"))) == 5
    assert "Dialogue d0" not in text(samples), "it stands in train"
    assert "Ann: hello number 1 Bob: hi Reference reference 1 Hedgehog & LoRA main says 1" in text(samples)

    made = text(section(page, "provenance"))
    assert "hedgehog run c.yaml all stages" in made and "feature_map: hedgehog_softmax" in made
    assert "f" * 64 in made and "torch 2.11" in made


def test_the_page_needs_no_other_and_runs_nothing(finished):
    """No script, and nothing that a browser would fetch."""

    class Finder(HTMLParser):
        seen: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.add(tag)
            for name, _ in attrs:
                assert name not in ("src", "href", "srcset", "data", "action") and not name.startswith("on")

    content = write_report("trial").read_text()
    Finder().feed(content)
    assert Finder.seen.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    assert "url(" not in content and "@import" not in content


def test_ids_are_unique(finished):
    finished.stage("distill/layers-0", [{"step": 1, "kl_nats": 1.0}], summary={"layers": [0], "kl_per_layer": [0.1]})
    ids = [e.attrib["id"] for e in read(write_report("trial")).iter() if "id" in e.attrib]
    assert len(ids) == len(set(ids)) > 10


HOSTILE = '</style></title><script>alert("x")</script> & \x00\x1b[31m \ud800 ]]> <!--'


def test_nothing_of_the_data_becomes_markup(new_folder):
    run = new_folder
    storable = " ".join(re.sub("[\x00\x1b\ud800]", "", HOSTILE).split())  # in YAML and manifests
    run.config(label=storable)
    run.dialogues(["seen", HOSTILE, "c"])
    run.stage(
        "finetune", [{"step": 1, "loss_nats": 2.0}], status="running", error=storable, versions={storable: storable}
    )
    run.stage("evaluate", summary={}, command=["hedgehog", storable])
    run.scores(main={})
    content = json.loads((run.root / "evaluate/rouge.json").read_text())
    content["variants"]["main"]["label"] = content["settings"]["precision"] = HOSTILE
    (run.root / "evaluate/rouge.json").write_text(json.dumps(content))
    run.predictions("main", ["a", HOSTILE, HOSTILE * 500])
    file = write_report("trial")
    page = read(file)
    assert not list(page.iter("script")) and "<script" not in file.read_text()
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    for place in ("results", "summaries"):
        assert shown in text(section(page, place)), place
    for element in (page.find("body/header"), section(page, "cost"), section(page, "provenance")):
        assert storable in text(element)


def test_a_run_that_has_just_begun(new_folder):
    new_folder.config()
    new_folder.stage("prepare", status="running")
    new_folder.age()
    page = read(write_report("trial"))
    assert [e.get("id") for e in page.iter("section")] == SECTIONS
    command = "hedgehog run runs/trial/config.resolved.yaml"
    header = text(page.find("body/header"))
    assert f"Not finished. To go on: {command}" in header
    assert "… prepare unfinished" in header and "– distill not started; 0 of 2 variants done" in header
    for name, said in (
        ("results", "No scores: there is no rouge.json yet."),
        ("stage-one", "No KL per layer: distill has not begun."),
        ("stage-two", "No losses: finetune has not begun."),
        ("summaries", "None yet: evaluate has written no predictions."),
    ):
        assert f"{said} {command} makes" in text(section(page, name))
    assert not [e for e in page.iter("svg") if e.get("role") == "img"]


def test_what_may_be_running_is_called_that(new_folder):
    """Someone who is told to go on would run a second process beside the first."""
    new_folder.config()
    new_folder.stage("prepare", status="running")
    command = "hedgehog run runs/trial/config.resolved.yaml"
    header = text(read(write_report("trial")).find("body/header"))
    said = "Not finished. prepare may be running: files were written there just before this page. "
    assert f"{said}Where nothing runs any more, to go on: {command}" in header
    manifest = read_manifest(new_folder.root / "prepare")
    assert manifest is not None
    manifest.model_copy(update={"interrupted": "SIGINT"}).write(new_folder.root / "prepare")
    assert f"Not finished. To go on: {command}" in text(read(write_report("trial")).find("body/header"))


def submit(root: Path, *command: str) -> None:
    job = JobRecord(name="distill", stage="distill", job_id="7", script="x", submitted_at="2026-01-01T00:00:00+00:00")
    write_records(RunFolder(root), JobRecords(command=list(command), jobs=[job]))


def test_a_submitted_run_goes_on_in_slurm_which_is_not_asked(new_folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    new_folder.config()
    submit(new_folder.root, "hedgehog", "submit", "my config.yaml")
    status = "hedgehog status runs/trial"
    assert f"It was submitted to Slurm: `{status}` says what its jobs do." in invoke("trial").stderr
    new_folder.stage("prepare")
    page = read(write_report("trial"))
    header = text(page.find("body/header"))
    said = f"Not finished. Submitted to Slurm: {status} says what its jobs do; "
    assert f"{said}hedgehog submit 'my config.yaml' submits what is missing." in header
    assert "hedgehog run" not in header and "To go on" not in text(page)
    assert "evaluate has written no predictions. The top of the page says how the run goes on." in text(page)
    submit(new_folder.root)
    assert f"{status} says what its jobs do." in text(read(write_report("trial")).find("body/header"))


def test_a_finished_run_that_was_submitted_has_nothing_to_submit(finished):
    submit(finished.root, "hedgehog", "submit", "c.yaml")
    assert "Slurm" not in text(read(write_report("trial")).find("body/header"))


def test_a_stage_that_is_being_done_shows_what_it_has(new_folder, training_records):
    new_folder.config(distill={"max_steps": 200})
    folder = new_folder.stage("distill", training_records(80, "kl_nats", "validation_kl_nats"), status="running")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 81, "kl_na')  # torn by a kill
    page = read(write_report("trial"))
    assert "… distill unfinished, 80 of 200 steps" in text(page.find("body/header"))
    one = section(page, "stage-one")
    assert "No KL per layer: distill has recorded none." in text(one)
    assert "at step 80" in next(e.text or "" for e in one.iter("desc"))


def test_a_run_without_variants_compares_with_nothing(finished):
    finished.config(variants={})
    for name in ("soft", "t2r"):
        for stage in ("distill", "finetune"):
            for file in (finished.root / "variants" / name / stage).iterdir():
                file.unlink()
    finished.scores(main={})
    content = json.loads((finished.root / "evaluate/rouge.json").read_text())
    (finished.root / "evaluate/rouge.json").write_text(json.dumps({**content, "softmax_reference": None}))
    page = read(write_report("trial"))
    header = text(page.find("body/header"))
    assert "Hedgehog & LoRA: ROUGE-1 is 40.00 ± 2.00, loss 1.2500 nats a token." in header
    assert "Dashed" not in text(section(page, "results")) and len(rows(section(page, "results"))) == 2


def test_subsets_of_layers_are_shown_before_they_are_merged(new_folder):
    new_folder.config()
    new_folder.stage("prepare")
    for first, kl in ((0, 0.5), (8, 0.25)):
        layers = [first, first + 1]
        new_folder.stage(
            f"distill/layers-{first}-{first + 1}",
            [{"step": step, "kl_nats": kl, "step_s": 1.0} for step in (1, 2)],
            summary={"layers": layers, "kl_per_layer": [kl, kl], "kl_per_head": [[kl], [kl]], "steps": 2},
        )
    page = read(write_report("trial"))
    header = text(page.find("body/header"))
    assert "… distill in parts, 2 of 2 done" in header
    assert "To go on, in this order: hedgehog merge runs/trial/config.resolved.yaml hedgehog run " in header
    assert "No losses: finetune has not begun. The commands at the top of the page make them." in text(page)
    one = section(page, "stage-one")
    hints = [text(e) for e in one.iter("title")]
    assert [hint for hint in hints if hint.startswith("layer ")] == [
        f"layer {layer}: {kl} (heads {kl} to {kl})" for layer, kl in ((0, 0.5), (1, 0.5), (8, 0.25), (9, 0.25))
    ]
    legend = next(e for e in one.iter("ul") if e.get("class") == "legend")
    assert [text(item) for item in legend] == ["Hedgehog & LoRA, layers 0-1", "Hedgehog & LoRA, layers 8-9"]


def test_a_folder_without_a_config(finished):
    (finished.root / "config.resolved.yaml").unlink()
    page = read(write_report("trial"))
    assert text(next(page.iter("h1"))) == "trial"
    assert "t2r" in text(section(page, "cost")) and "Config" not in text(section(page, "provenance"))


def test_a_renamed_run_has_one_name(finished):
    assert "made as" not in text(read(write_report("trial")).find("body/header"))
    finished.root.rename("runs/other")
    page = read(write_report("other"))
    assert text(page.find("head/title")) == "other: a Hedgehog-Llama conversion"
    assert text(next(page.iter("h1"))) == "other" and "made as trial" in text(page.find("body/header"))


def test_process_hours_of_several_attempts_say_what_they_count(finished):
    said = "process-hours at the last attempt's number of processes, all attempts counted"
    assert said not in text(section(read(write_report("trial")), "cost"))
    manifest = read_manifest(finished.root / "finetune")
    assert manifest is not None
    manifest.model_copy(update={"num_resumes": 1}).write(finished.root / "finetune")
    assert said in text(section(read(write_report("trial")), "cost"))


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


def test_scores_of_earlier_weights_are_called_that(finished):
    manifest = json.loads((finished.root / "evaluate/manifest.json").read_text())
    tuned = read_manifest(finished.root / "variants/t2r/finetune")
    assert tuned is not None
    for digest, expected in ((tuned.output_fingerprint, False), ("0" * 64, True)):
        manifest["consumed"] = {"t2r/finetune": digest, "data": "1" * 64}
        (finished.root / "evaluate/manifest.json").write_text(json.dumps(manifest))
        said = text(section(read(write_report("trial")), "results"))
        assert ("scores of earlier weights: t2r/finetune ran anew since" in said) == expected


def link_inputs(root: Path) -> None:
    """Notes in every manifest what its stage consumed, as the runner does."""

    def digest(place: str) -> str:
        manifest = read_manifest(root / place)
        assert manifest is not None
        return manifest.output_fingerprint

    def consume(place: str, **consumed: str) -> None:
        manifest = read_manifest(root / place)
        assert manifest is not None
        manifest.model_copy(update={"consumed": {key: digest(of) for key, of in consumed.items()}}).write(root / place)

    scored = {"prepare": "prepare", "distill": "distill", "finetune": "finetune"}
    for prefix, name in (("", "main"), ("variants/soft/", "soft"), ("variants/t2r/", "t2r")):
        consume(f"{prefix}distill", prepare="prepare")
        consume(f"{prefix}finetune", prepare="prepare", distill=f"{prefix}distill")
        scored |= {f"{name}/prepare": "prepare"}
        scored |= {f"{name}/{stage}": f"{prefix}{stage}" for stage in ("distill", "finetune")}
    consume("evaluate", **scored)
    consume("export", prepare="prepare", distill="distill", finetune="finetune")


def make_anew(folder: Path, **values: Any) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    artifacts = {"made": Artifact(path="manifest.json", sha256="9" * 64, num_bytes=1)}
    manifest.model_copy(update={"artifacts": artifacts, **values}).write(folder)


C = "runs/trial/config.resolved.yaml"
AGAIN = "To make them again, in this order:"


@pytest.mark.parametrize(
    ("place", "said", "out_of_date"),
    [
        (
            "distill",
            "Out of date: finetune (distill ran anew since). So is what follows: evaluate, export. "
            f"{AGAIN} hedgehog finetune {C} --force hedgehog evaluate {C} --force hedgehog export {C} --force",
            ["finetune", "evaluate", "export"],
        ),
        (
            "variants/t2r/distill",
            "Out of date: t2r/finetune (t2r/distill ran anew since). So is what follows: evaluate. "
            f"{AGAIN} hedgehog finetune {C} --force --variant t2r hedgehog evaluate {C} --force",
            ["finetune", "evaluate"],
        ),
        (
            "finetune",
            "Out of date: evaluate (finetune ran anew since); export (finetune ran anew since). "
            f"{AGAIN} hedgehog evaluate {C} --force hedgehog export {C} --force",
            ["evaluate", "export"],
        ),
        (
            "variants/t2r/finetune",
            f"Out of date: evaluate (t2r/finetune ran anew since). To make it again: hedgehog evaluate {C} --force",
            ["evaluate"],
        ),
        (
            "prepare",
            "Out of date: distill (prepare ran anew since); t2r/distill (prepare ran anew since); "
            "soft/finetune (prepare ran anew since). So is what follows: finetune, t2r/finetune, evaluate, export. ",
            ["distill", "finetune", "finetune", "finetune", "distill", "evaluate", "export"],
        ),
    ],
)
def test_the_first_stage_that_is_out_of_date_is_named_and_what_follows(finished, place, said, out_of_date):
    link_inputs(finished.root)
    assert "ut of date" not in text(read(write_report("trial")))
    make_anew(finished.root / place)
    page = read(write_report("trial"))
    header = page.find("body/header")
    assert said in text(header)
    cost = rows(section(page, "cost"))
    assert sorted(row[0] for row in cost if row[2] == "done, out of date") == sorted(out_of_date)
    assert "! evaluate done, but out of date" in text(header) and "✓ evaluate" not in text(header)
    assert "These are scores of earlier weights: " in text(section(page, "results"))


def test_scores_of_stale_weights_are_stale_though_made_since(finished):
    """Evaluate ran after distill was made anew, but scored the finetune of before."""
    link_inputs(finished.root)
    before = read_manifest(finished.root / "finetune")
    make_anew(finished.root / "distill")
    link_inputs(finished.root)
    assert before is not None
    before.write(finished.root / "finetune")
    header = text(read(write_report("trial")).find("body/header"))
    assert "Out of date: finetune (distill ran anew since). So is what follows: evaluate, export." in header


def test_subsets_are_made_again_before_they_are_merged(finished):
    prepare = read_manifest(finished.root / "prepare")
    assert prepare is not None
    consumed = {"prepare": prepare.output_fingerprint}
    for layers in ("0", "1"):
        finished.stage(f"distill/layers-{layers}", consumed=consumed, summary={"layers": [int(layers)]})
    link_inputs(finished.root)
    make_anew(finished.root / "prepare")
    header = text(read(write_report("trial")).find("body/header"))
    subsets = " ".join(f"hedgehog distill {C} --layers {layers} --force" for layers in ("0", "1"))
    assert f"{AGAIN} {subsets} hedgehog merge {C} --force hedgehog distill {C} --force --variant t2r" in header


def test_an_input_that_is_being_made_anew_comes_first(finished):
    link_inputs(finished.root)
    make_anew(finished.root / "distill", status="running")
    finished.age()
    header = text(read(write_report("trial")).find("body/header"))
    assert header.index("To go on") < header.index("Out of date: finetune (distill ran anew since)")


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


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the operating system refuse a file, or all in a folder; root, as whom tests may run, may read any."""

    def forbid(name: str) -> None:
        def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *arguments: Any, **options: Any) -> Any:
                if isinstance(path, (str, Path)) and name in Path(path).parts:
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return function(path, *arguments, **options)

            return call

        monkeypatch.setattr("io.open", refusing(open))  # what pathlib calls
        monkeypatch.setattr("pathlib.Path.stat", refusing(Path.stat))
        monkeypatch.setattr("pathlib.Path.mkdir", refusing(Path.mkdir))

    return forbid


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


def test_thousands_of_steps_make_a_small_file_that_says_so(new_folder, training_records):
    new_folder.config(variants={f"v{number}": {} for number in range(8)})
    new_folder.dialogues(["x" * 100_000] * 8)
    places = ["", *(f"variants/v{number}/" for number in range(8))]
    for place in places:
        kl = {"kl_per_layer": [0.1] * 80, "kl_per_head": [[0.1] * 64] * 80, "layers": list(range(80)), "steps": 1}
        records = training_records(20_000, "kl_nats", "validation_kl_nats")
        new_folder.stage(f"{place}distill", records, summary=kl)
        records = training_records(5_000, "loss_nats", "validation_loss_nats")
        new_folder.stage(f"{place}finetune", records)
    new_folder.stage("evaluate")
    new_folder.predictions("main", ["y" * 100_000] * 8)
    file = write_report("trial")
    assert file.stat().st_size < 2_000_000
    page = read(file)
    assert max(map(len, re.findall("x+|y+", file.read_text()))) == 2000
    assert "… [cut here]" in text(section(page, "summaries"))
    assert "mean over 67 recorded steps" in text(section(page, "stage-one"))
    assert "mean over 17 recorded steps" in text(section(page, "stage-two"))
    assert "at most 16 marks are shown, evenly chosen" in text(section(page, "stage-two"))


def test_mistakes_are_one_message_with_a_cure(new_folder, tmp_path):
    missing = invoke("nowhere")
    assert missing.exit_code == 2 and "nowhere: no run folder" in missing.stderr
    new_folder.config()
    nothing = invoke("trial")
    assert nothing.exit_code == 2 and not list(Path("runs").rglob("*.html"))
    assert nothing.stderr == (
        "error: runs/trial: nothing to report yet, no stage of this run has begun. "
        "`hedgehog run runs/trial/config.resolved.yaml` begins it.\n"
    )
    new_folder.stage("prepare")
    folder = invoke("trial", "--output", tmp_path)
    assert folder.exit_code == 2 and f"{tmp_path} is a folder: name a file in it" in folder.stderr
    (tmp_path / "file").write_text("x")
    below = invoke("trial", "--output", tmp_path / "file" / "report.html")
    assert below.exit_code == 2 and "cannot be written" in below.stderr
    assert "hedgehog report trial --output FILE" in below.stderr


def test_output_in_a_folder_that_may_not_be_entered(finished, forbid):
    Path("private").mkdir()
    Path("runs/trial").rename("runs/my trial")
    forbid("private")
    result = invoke("my trial", "--output", "private/report.html")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: private/report.html: cannot be written (Permission denied). "
        "Give another place: hedgehog report 'my trial' --output FILE\n"
    )


def test_output_follows_a_link(finished):
    Path("elsewhere").mkdir()
    Path("elsewhere/real.html").write_text("old")
    Path("link.html").symlink_to("elsewhere/real.html")
    Path("new.html").symlink_to("elsewhere/new.html")
    for name in ("link", "new"):
        assert invoke("trial", "--output", f"{name}.html").stdout == f"{name}.html\n"
        assert Path(f"{name}.html").is_symlink()
    assert read(Path("elsewhere/real.html")).tag == read(Path("elsewhere/new.html")).tag == "html"
    Path("loop").symlink_to("loop")
    assert "cannot be written (Too many levels of symbolic links)" in invoke("trial", "--output", "loop").stderr


def test_output_is_no_folder_and_no_device(finished):
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "socket", "/dev/null"):
            result = invoke("trial", "--output", name)
            assert result.exit_code == 2 and f"{name} is no ordinary file" in result.stderr
    assert "goes to a file, not to the terminal" in invoke("trial", "--output", "-").stderr
    for name in ("new/", "new folder/"):
        result = invoke("trial", "--output", name)
        assert result.exit_code == 2 and "is a folder: name a file in it" in result.stderr
        assert result.stderr.endswith(f"--output {shlex.quote(name + 'report.html')}\n")
    assert sorted(path.name for path in Path().iterdir()) == ["pipe", "runs", "socket"]


def test_a_folder_that_may_not_be_written_in(finished, monkeypatch):
    """As root every folder may be, so the refusal is the operating system's word, not its deed."""
    earlier = write_report("trial").read_text()

    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("hedgehog.pipeline.run_folder.os.replace", refuse)
    result = invoke("trial")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: runs/trial/report.html: cannot be written (Read-only file system).")
    assert Path("runs/trial/report.html").read_text() == earlier
    assert not list(Path("runs").rglob("*.partial"))


def test_a_login_node_without_torch_writes_it(finished):
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom hedgehog.pipeline.cli import app\n"
        "app(['report', 'trial'], standalone_mode=False)\nprint('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "runs/trial/report.html\nFalse\n"), done.stderr
