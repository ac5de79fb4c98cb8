"""The whole page, of runs in every state."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from hedgehog.pipeline.manifest import read_manifest
from hedgehog.pipeline.report.writing import write_report
from hedgehog.pipeline.run_folder import RunFolder
from hedgehog.pipeline.slurm.job_records import JobRecord, JobRecords, write_records

from .reading import SECTIONS, invoke, read, rows, section, text


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
